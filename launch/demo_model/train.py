#!/usr/bin/env python3
"""Train the small demo model: a Llama of about 3 million weights that tells children's tales.

Give it a corpus folder (train.txt and valid.txt: plain text, one paragraph a line, a line
`<|story|>` between stories) and a number of minutes.  It trains the SentencePiece tokenizer,
trains the model on the CPU, and writes a folder in the Hugging Face layout:

  config.json  generation_config.json  tokenizer_config.json  special_tokens_map.json
  tokenizer.model      SentencePiece BPE with byte fallback
  tokenizer.json       the same, in the form of HF's fast tokenizers
  model.safetensors    f16, HF LlamaForCausalLM names, embeddings tied (no lm_head.weight)
  training_log.csv     step, tokens, seconds, train_loss, valid_loss
  valid_sample.txt     the beginning of valid.txt, for evaluation without the corpus
  calibration_sample.txt   text from train.txt, for calibrating a quantisation
  training_summary.json    tokens, wall time, held-out perplexity and bits per byte

model.safetensors is replaced (atomically) every few minutes, so the folder can be loaded while
the training is still going on.  The learning rate follows the clock, not a step count: it warms
up, then falls along a cosine that reaches its end when the minutes are over.

Several worker processes of one thread each share a step and average their gradients once.  On a
machine that also does other work this is much faster than one process with several threads, which
wait for each other at every operation.  A malloc that keeps freed pages (tcmalloc) helps as well:

  LD_PRELOAD=libtcmalloc_minimal.so.4 nice -n 19 python3 train.py CORPUS OUT --minutes 25

Needs: torch, numpy, sentencepiece, safetensors.  reference.py makes reference.json afterwards.
"""
import argparse, contextlib, csv, json, math, os, random, tempfile, time

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save

BOS, EOS = 1, 2


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("corpus", help="folder with train.txt and valid.txt")
    p.add_argument("out", help="folder to write the model to")
    p.add_argument("--minutes", type=float, default=45, help="wall-clock budget of the training (default %(default)s)")
    p.add_argument("--save-minutes", type=float, default=3, help="write a checkpoint this often (default %(default)s)")
    p.add_argument("--workers", type=int, default=2, help="processes, one per core (default %(default)s)")
    p.add_argument("--fp32", action="store_true", help="no bf16 autocast (for CPUs without bf16 instructions)")
    p.add_argument("--seed", type=int, default=1)
    g = p.add_argument_group("shape", "heads and intermediate size should divide by the tensor-parallel degree")
    g.add_argument("--vocab", type=int, default=2048)
    g.add_argument("--hidden", type=int, default=256)
    g.add_argument("--layers", type=int, default=4)
    g.add_argument("--heads", type=int, default=8)
    g.add_argument("--kv-heads", type=int, default=4)
    g.add_argument("--head-dim", type=int, default=32)
    g.add_argument("--intermediate", type=int, default=512)
    g.add_argument("--context", type=int, default=1024, help="longest sequence; trains on a quarter of it, from "
                   "75%% of the time on half, in the last 10%% all of it (default %(default)s)")
    g = p.add_argument_group("optimiser")
    g.add_argument("--batch-tokens", type=int, default=2048, help="tokens a step, all workers together (default %(default)s)")
    g.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default %(default)s)")
    g.add_argument("--warmup", type=int, default=100, help="warm-up steps (default %(default)s)")
    g.add_argument("--weight-decay", type=float, default=0.1)
    g.add_argument("--dropout", type=float, default=0.0, help="on the two residual branches of a layer")
    return p.parse_args()


# ---------------------------------------------------------------- text

def read_stories(path):
    with open(path, encoding="utf-8") as f:
        return [s.strip("\n") for s in f.read().split("<|story|>") if s.strip()]


def train_tokenizer(stories, vocab, path):
    """Llama's settings: BPE, byte fallback, identity normaliser, a leading space added, digits split."""
    lines = (line for s in stories for line in s.split("\n") if line)
    with open(path + ".tmp", "wb") as f:
        spm.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=f, model_type="bpe", vocab_size=vocab, byte_fallback=True,
            unk_id=0, bos_id=BOS, eos_id=EOS, pad_id=-1, unk_surface=" \u2047 ",
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
            split_digits=True, character_coverage=1.0, max_sentence_length=1 << 20, minloglevel=2)
    os.replace(path + ".tmp", path)
    return spm.SentencePieceProcessor(model_file=path)


def tokenizer_json(sp):
    """The same tokenizer in the form of HF's fast tokenizers: merges are all splits of a piece into two, best piece first."""
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    scored = [(i, p) for p, i in vocab.items() if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    merges = []
    for i, piece in sorted(scored):        # BPE ids of merged pieces are in order of merging
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
        merges += [f"{a} {b}" for a, b in sorted(splits, key=lambda s: (vocab[s[0]], vocab[s[1]]))]
    special = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for i, t in enumerate(("<unk>", "<s>", "</s>"))]
    bos = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
            "pre_tokenizer": None,
            "post_processor": {"type": "TemplateProcessing", "single": bos,
                               "pair": bos + [{"Sequence": {"id": "B", "type_id": 1}}],
                               "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
                      "merges": merges}}


class Corpus:
    """The training stories as an endless token stream, in a new order each epoch.

    A story is <s> text </s>.  Half of the time its title line is left out, so that the model learns
    to begin a tale straight after <s>, which is what a prompt without a title asks of it.
    """

    def __init__(self, tokenizer, stories, seed):
        self.titled = [np.array([BOS] + ids + [EOS], np.int64) for ids in tokenizer.encode(stories)]
        self.untitled = [np.array([BOS] + ids + [EOS], np.int64)
                         for ids in tokenizer.encode([s.split("\n", 1)[-1].lstrip("\n") for s in stories])]
        self.random = random.Random(seed)
        self.stream, self.at, self.epochs = np.zeros(0, np.int64), 0, 0

    def refill(self):
        order = list(range(len(self.titled)))
        self.random.shuffle(order)
        fresh = [self.random.choice((self.titled, self.untitled))[i] for i in order]
        self.stream = np.concatenate([self.stream[self.at:]] + fresh)
        self.at, self.epochs = 0, self.epochs + 1
        self.starts = None

    def batch(self, rows, length):
        """Rows lie far apart in the stream, so that one step sees many stories."""
        need = rows * length + 1
        if self.at + need > len(self.stream):
            self.refill()
        if self.starts is None or self.length != length:        # cut what is left into windows, shuffle them
            self.length = length
            n = (len(self.stream) - self.at - 1) // length
            self.starts = [self.at + i * length for i in range(n)]
            self.random.shuffle(self.starts)
            self.end = self.at + n * length
        if len(self.starts) < rows:
            self.at = self.end
            return self.batch(rows, length)
        take = [self.starts.pop() for _ in range(rows)]
        block = torch.from_numpy(np.stack([self.stream[s:s + length + 1] for s in take]))
        return block[:, :-1], block[:, 1:]


# ---------------------------------------------------------------- model

class Layer(nn.Module):
    """One Llama layer; the attribute names are those of the HF checkpoint."""

    def __init__(self, a):
        super().__init__()
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.input_layernorm = nn.RMSNorm(a.hidden, eps=1e-5)
        self.self_attn = nn.ModuleDict({
            "q_proj": linear(a.hidden, a.heads * a.head_dim), "k_proj": linear(a.hidden, a.kv_heads * a.head_dim),
            "v_proj": linear(a.hidden, a.kv_heads * a.head_dim), "o_proj": linear(a.heads * a.head_dim, a.hidden)})
        self.post_attention_layernorm = nn.RMSNorm(a.hidden, eps=1e-5)
        self.mlp = nn.ModuleDict({"gate_proj": linear(a.hidden, a.intermediate),
                                  "up_proj": linear(a.hidden, a.intermediate),
                                  "down_proj": linear(a.intermediate, a.hidden)})
        self.a = a

    def forward(self, x, cos, sin):
        a, w = self.a, self.self_attn
        b, t, _ = x.shape
        h = self.input_layernorm(x)
        q = rotate(w["q_proj"](h).view(b, t, a.heads, a.head_dim).transpose(1, 2), cos, sin)
        k = rotate(w["k_proj"](h).view(b, t, a.kv_heads, a.head_dim).transpose(1, 2), cos, sin)
        v = w["v_proj"](h).view(b, t, a.kv_heads, a.head_dim).transpose(1, 2)
        group = a.heads // a.kv_heads                            # query head j reads key/value head j // group
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        o = attend(q, k, v).transpose(1, 2).reshape(b, t, -1)
        x = x + F.dropout(w["o_proj"](o), a.dropout, self.training)
        h, m = self.post_attention_layernorm(x), self.mlp
        return x + F.dropout(m["down_proj"](F.silu(m["gate_proj"](h)) * m["up_proj"](h)), a.dropout, self.training)


def rotate(x, cos, sin):
    """Rotary positions, HF "rotate half": dimension i turns with dimension i + head_dim / 2."""
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


def attend(q, k, v):
    """Causal softmax attention by plain matrix products: for short sequences on a CPU faster than torch's kernel."""
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d).to(v.dtype) for x in (q, k, v))
    hidden = torch.full((t, t), -1e30, dtype=v.dtype).triu(1).expand(b * h, t, t)
    scores = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=d ** -0.5)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).view(b, h, t, d)


class Llama(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.embed_tokens = nn.Embedding(a.vocab, a.hidden)
        self.layers = nn.ModuleList(Layer(a) for _ in range(a.layers))
        self.norm = nn.RMSNorm(a.hidden, eps=1e-5)
        angle = torch.outer(torch.arange(a.context), 10000.0 ** (-torch.arange(0, a.head_dim, 2) / a.head_dim))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * a.layers) if last else 0.02)

    def forward(self, ids, targets):
        x, t = self.embed_tokens(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def held_out(model, stream, length, windows=None, rows=8):
    """Mean NLL per token over windows laid end to end on the stream, each with no memory of the last."""
    model.eval()
    n = (len(stream) - 1) // length
    n = min(n, windows or n)
    total = 0.0
    for i in range(0, n, rows):
        block = torch.stack([stream[j * length:(j + 1) * length + 1] for j in range(i, min(n, i + rows))])
        total += model(block[:, :-1], block[:, 1:]).item() * len(block)
    model.train()
    return total / n


# ---------------------------------------------------------------- files

def write(path, data):
    """Write to one side and rename: a reader sees the old file or the new one, never half of one."""
    with open(path + ".tmp", "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode())
    os.replace(path + ".tmp", path)


def save_weights(model, path):
    write(path, save({"model." + k: v.detach().half().contiguous() for k, v in model.state_dict().items()},
                     metadata={"format": "pt"}))


def save_configs(a):
    def put(name, value):
        write(os.path.join(a.out, name), json.dumps(value, indent=2) + "\n")
    put("config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
        "bos_token_id": BOS, "eos_token_id": EOS, "hidden_act": "silu", "hidden_size": a.hidden,
        "initializer_range": 0.02, "intermediate_size": a.intermediate, "max_position_embeddings": a.context,
        "num_attention_heads": a.heads, "num_hidden_layers": a.layers, "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "float16", "use_cache": True,
        "vocab_size": a.vocab})
    put("generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": True, "temperature": 0.7,
                                   "top_p": 0.9, "max_new_tokens": 256})
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    put("special_tokens_map.json", special)
    token = lambda s: {"content": s, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                       "special": True}
    put("tokenizer_config.json", {
        "add_bos_token": True, "add_eos_token": False,
        "added_tokens_decoder": {"0": token("<unk>"), "1": token("<s>"), "2": token("</s>")}, **special,
        "pad_token": None, "clean_up_tokenization_spaces": False, "legacy": True, "model_max_length": a.context,
        "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer"})


def save_samples(a, train, valid):
    """Whole stories, as many as fit; the calibration stories are picked evenly over the training text."""
    def fill(stories, limit):
        text = ""
        for s in stories:
            if len(text) + len(s) + 13 <= limit:
                text += ("\n\n<|story|>\n" if text else "") + s
        return text + "\n"
    write(os.path.join(a.out, "valid_sample.txt"), fill(valid, 40_000))
    write(os.path.join(a.out, "calibration_sample.txt"), fill(train[::len(train) // 40], 150_000))


# ---------------------------------------------------------------- training

def train(rank, a, rendezvous):
    dist.init_process_group("gloo", init_method="file://" + rendezvous, rank=rank, world_size=a.workers)
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)                                    # every worker starts from the same weights
    path = lambda name: os.path.join(a.out, name)
    first = rank == 0                                            # the worker that measures and writes

    stories = {k: read_stories(os.path.join(a.corpus, k + ".txt")) for k in ("train", "valid")}
    tokenizer = spm.SentencePieceProcessor(model_file=path("tokenizer.model"))
    corpus = Corpus(tokenizer, stories["train"], a.seed)
    valid = torch.tensor([t for ids in tokenizer.encode(stories["valid"]) for t in [BOS] + ids + [EOS]])
    valid_bytes = sum(len(s.encode()) for s in stories["valid"])

    model = Llama(a)
    weights = list(model.parameters())
    count, epoch = sum(p.numel() for p in weights), sum(map(len, corpus.titled))
    adam = torch.optim.AdamW([{"params": [p for p in weights if p.dim() == 2], "weight_decay": a.weight_decay},
                              {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0}],
                             lr=a.lr, betas=(0.9, 0.98), fused=True)
    precision = contextlib.nullcontext if a.fp32 else lambda: torch.autocast("cpu", torch.bfloat16)
    if first:
        print(f"{count} weights, {epoch} training tokens, {len(valid)} held-out tokens", flush=True)
        log = open(path("training_log.csv"), "w", newline="")
        table = csv.writer(log, lineterminator="\n")
        table.writerow(["step", "tokens", "seconds", "train_loss", "valid_loss"])

    start = saved = logged = time.time()
    step, tokens, progress, losses = 0, 0, 0.0, []
    while progress < 1:
        length = a.context // (4 if progress < 0.75 else 2 if progress < 0.9 else 1)
        rows = max(1, a.batch_tokens // a.workers // length)
        rate = a.lr * min(1.0, (step + 1) / a.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in adam.param_groups:
            group["lr"] = rate
        ids, targets = corpus.batch(rows * a.workers, length)
        mine = slice(rank * rows, (rank + 1) * rows)
        with precision():
            loss = model(ids[mine], targets[mine])
        loss.backward()

        # One sum over the workers carries the gradients, the loss, and the clock of the first worker.
        clock = (time.time() - start) / (60 * a.minutes) * a.workers if first else 0.0
        flat = torch.cat([p.grad.flatten() for p in weights] + [torch.tensor([loss.item(), clock])])
        dist.all_reduce(flat)
        flat /= a.workers
        at = 0
        for p in weights:
            p.grad.copy_(flat[at:at + p.numel()].view_as(p))
            at += p.numel()
        loss, progress = flat[-2].item(), flat[-1].item()
        nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=False)
        step, tokens = step + 1, tokens + ids.numel()

        if first:
            losses.append(loss)
            now = time.time()
            if now - logged > 100 or progress >= 1:
                with precision():
                    check = held_out(model, valid, 512, windows=16, rows=4)
                table.writerow([step, tokens, round(now - start), f"{np.mean(losses):.4f}", f"{check:.4f}"])
                log.flush()
                print(f"step {step} tokens {tokens} seconds {now - start:.0f} train {np.mean(losses):.4f} "
                      f"valid {check:.4f}", flush=True)
                logged, losses = time.time(), []
            if now - saved > 60 * a.save_minutes or progress >= 1:
                save_weights(model, path("model.safetensors"))
                saved = time.time()
    seconds = time.time() - start
    dist.destroy_process_group()
    if not first:
        return

    torch.set_num_threads(a.workers)
    with torch.no_grad():                                        # judge what is shipped: the f16 weights, in f32
        for p in weights:
            p.copy_(p.half())
    nll = held_out(model, valid, a.context, rows=1)
    summary = json.dumps({
        "weights": count, "steps": step, "tokens": tokens, "epochs": tokens / epoch, "seconds": round(seconds),
        "valid_nll_per_token": nll, "valid_perplexity_per_token": math.exp(nll),
        "valid_bits_per_byte": nll / math.log(2) * len(valid) / valid_bytes}, indent=2) + "\n"
    write(path("training_summary.json"), summary)
    print(summary)


def main():
    a = arguments()
    os.makedirs(a.out, exist_ok=True)
    train_stories, valid_stories = (read_stories(os.path.join(a.corpus, k + ".txt")) for k in ("train", "valid"))
    train_tokenizer(train_stories, a.vocab, os.path.join(a.out, "tokenizer.model"))
    save_configs(a)
    write(path("tokenizer.json"), json.dumps(tokenizer_json(tokenizer), ensure_ascii=False,
                                             separators=(",", ":")) + "\n")
    save_samples(a, train_stories, valid_stories)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (a, os.path.join(folder, "rendezvous")), nprocs=a.workers)


if __name__ == "__main__":
    main()
