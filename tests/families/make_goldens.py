#!/usr/bin/env python3
"""Logits of Hugging Face transformers for tiny random models of every family: writes goldens.safetensors.

    python3 tests/families/make_goldens.py build/dev/bin/rankwise-random-model

Needs torch, transformers and safetensors. The models of cases.json are written by rankwise-random-model (f32), which makes
the same bytes from the same seed, so that the test can make them again instead of reading megabytes from the repository.
transformers computes in float64, but for what it always does in float32 (rotary angles, norms, softmax); `CASE.f32_error` is
how far its all-float32 run is from that.

llama, mistral, qwen2 and qwen3 are read by transformers itself, configuration included. internlm and internlm2 have no class
there; their twin is a llama with biases. InternLM2's wqkv is taken apart here by its published layout: for each KV head, the
query heads that read it, then k, then v (head_dim rows each).
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.utils.logging.disable_progress_bar()
HERE = pathlib.Path(__file__).parent


def tokens(count, vocab):
    """What family_test.cc computes too: no id twice in a row, and most ids of a small vocabulary."""
    return [(7 * i * i + 31 * i + 3) % vocab for i in range(count)]


def write_model(program, folder, case, sizes, seed):
    flags = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    flags += [f"--{key}" for key in ("bias", "mlp-bias", "tied") if case.get(key)]
    subprocess.run([program, folder, "--shape", "tiny", "--family", case["family"], "--dtype", "f32", "--seed", str(seed),
                    *flags], check=True, stderr=subprocess.DEVNULL)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | case.get("config", {})))


def llama_twin(folder, is_fused):
    own = json.loads((folder / "config.json").read_text())
    heads, kv_heads, dim = own["num_attention_heads"], own["num_key_value_heads"], own["head_dim"]
    rotary = own.get("rotary")
    config = transformers.LlamaConfig(
        hidden_size=own["hidden_size"], num_hidden_layers=own["num_hidden_layers"], num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=dim, intermediate_size=own["intermediate_size"],
        vocab_size=own["vocab_size"], max_position_embeddings=own["max_position_embeddings"],
        rms_norm_eps=own["rms_norm_eps"], attention_bias=own["bias"], rope_theta=rotary["base"] if rotary else 10000,
        rope_scaling={"rope_type": "dynamic", "factor": rotary["scaling_factor"]} if rotary else None)
    stored = load_file(folder / "model.safetensors")
    weights = {}
    for name, tensor in stored.items():
        if not is_fused:
            weights[name] = tensor
            continue
        for old, new in [("tok_embeddings", "embed_tokens"), ("attention_norm", "input_layernorm"),
                         ("ffn_norm", "post_attention_layernorm"), ("attention.wo", "self_attn.o_proj"),
                         ("feed_forward.w1", "mlp.gate_proj"), ("feed_forward.w2", "mlp.down_proj"),
                         ("feed_forward.w3", "mlp.up_proj")]:
            name = name.replace(old, new)
        if name.startswith("output."):
            name = "lm_head." + name.removeprefix("output.")
        if "attention.wqkv" not in name:
            weights[name] = tensor
            continue
        group_heads = heads // kv_heads
        parts = {"q": [], "k": [], "v": []}
        for group in tensor.chunk(kv_heads):  # [(group_heads + 2) * dim, hidden]
            rows = group.split(dim)
            parts["q"] += rows[:group_heads]
            parts["k"].append(rows[group_heads])
            parts["v"].append(rows[group_heads + 1])
        for letter, rows in parts.items():
            weights[name.replace("attention.wqkv", f"self_attn.{letter}_proj")] = torch.cat(rows).contiguous()
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=True)
    return model


def load_model(folder, family):
    if family.startswith("internlm"):
        return llama_twin(folder, is_fused=family == "internlm2")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise RuntimeError(f"{folder}: {kind}: {info[kind]}")
    return model


@torch.no_grad()
def logits_of(model, ids):
    return model.eval()(torch.tensor([ids])).logits[0]


def main():
    program = sys.argv[1]
    plan = json.loads((HERE / "cases.json").read_text())
    goldens = {}
    for index, case in enumerate(plan["cases"]):
        sizes = plan["sizes"] | case.get("sizes", {})
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            write_model(program, folder, case, sizes, index + 1)
            ids = tokens(plan["token_count"], sizes["vocab"])
            single = logits_of(load_model(folder, case["family"]), ids)
            exact = logits_of(load_model(folder, case["family"]).double(), ids)
        assert exact.dtype == torch.float64
        error = (single.double() - exact).abs().max()
        picked = exact[plan["positions"]]
        goldens[case["name"]] = picked.float().contiguous()
        goldens[case["name"] + ".f32_error"] = error.float().reshape(1)
        print(f"{case['name']:28} largest {picked.abs().max():7.3f}, float32 of transformers is off by {error:.1e}")
    save_file(goldens, HERE / "goldens.safetensors",
              {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]})


if __name__ == "__main__":
    main()
