#pragma once

#include "worker/comm/communicator.h"
#include "worker/comm/mpi_communicator.h"

// For tests under mpirun, linked with rankwise_mpi_test_main. Every rank runs every test. After each test the ranks
// agree: rank 0 reports what failed where, and the test has then failed on all. 60 s without the end of a test or a
// failure end the job, naming the test.
namespace rankwise::comm {

const MpiSession& TestSession();

// All ranks; lives from the first test to the last. A test that breaks a communicator breaks its own, made by
// CreateMpiCommunicator(TestSession(), ...).
Communicator& TestCommunicator();

}  // namespace rankwise::comm
