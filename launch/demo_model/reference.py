#!/usr/bin/env python3
"""The demo model in plain numpy, in float64: an oracle for the server's tests.

  reference.py MODEL                         continue "Once upon a time" greedily and print the tale
  reference.py MODEL --prompt "The fox"      another beginning
  reference.py MODEL --write reference.json  write what the tests compare against (needs valid_sample.txt)

reference.json holds, for each prompt, its token ids (with <s>), the greedy output ids, and for each
output token its log-probability and how much more probable it was than the runner-up (margin, in
nats of logit: a test may stop comparing ids where the margin is smaller than its arithmetic allows);
and token windows of held-out text with their mean negative log-likelihood, one value a window.

Needs: numpy, sentencepiece.
"""
import argparse, json, os, struct

import numpy as np
import sentencepiece as spm

PROMPTS = ["Once upon a time", "One day Peter Rabbit", "The old king had three sons, and", "\"Where are you going?\" asked the"]


def load(folder):
    """The safetensors format: a u64 header length, a JSON header, the data."""
    with open(os.path.join(folder, "model.safetensors"), "rb") as f:
        data = f.read()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    weights = {}
    for name, t in json.loads(data[8:start]).items():
        if name != "__metadata__":
            assert t["dtype"] == "F16"
            begin, end = t["data_offsets"]
            weights[name] = np.frombuffer(data[start + begin:start + end], "<f2").astype(np.float64).reshape(t["shape"])
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        return json.load(f), weights


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x, cos, sin):
    left, right = np.split(x, 2, -1)
    return np.concatenate((left * cos - right * sin, right * cos + left * sin), -1)


def forward(c, w, ids):
    """Logits [position, vocabulary] of one sequence."""
    t, d, eps = len(ids), c["head_dim"], c["rms_norm_eps"]
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    angle = np.outer(np.arange(t), c["rope_theta"] ** (-np.arange(0, d, 2) / d))
    cos, sin = np.cos(angle), np.sin(angle)
    later = np.triu(np.ones((t, t), bool), 1)
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(c["num_hidden_layers"]):
        p = lambda name: w[f"model.layers.{layer}.{name}.weight"]
        split = lambda y, n: y.reshape(t, n, d).transpose(1, 0, 2)
        h = norm(x, p("input_layernorm"), eps)
        q = rotate(split(h @ p("self_attn.q_proj").T, heads), cos, sin)
        k = rotate(split(h @ p("self_attn.k_proj").T, kv_heads), cos, sin).repeat(heads // kv_heads, 0)
        v = split(h @ p("self_attn.v_proj").T, kv_heads).repeat(heads // kv_heads, 0)
        s = np.where(later, -np.inf, q @ k.transpose(0, 2, 1) / np.sqrt(d))
        s = np.exp(s - s.max(-1, keepdims=True))
        o = (s / s.sum(-1, keepdims=True)) @ v
        x = x + o.transpose(1, 0, 2).reshape(t, heads * d) @ p("self_attn.o_proj").T
        h = norm(x, p("post_attention_layernorm"), eps)
        gate = h @ p("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p("mlp.up_proj").T)) @ p("mlp.down_proj").T
    return norm(x, w["model.norm.weight"], eps) @ w["model.embed_tokens.weight"].T


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def generate(c, w, ids, count, temperature=0.0, top_p=0.9, seed=0):
    """Continue ids; temperature 0 is greedy.  Returns ids, log-probabilities and margins; stops after </s>."""
    random, out, logprobs, margins = np.random.default_rng(seed), [], [], []
    while len(out) < count:
        logits = forward(c, w, (ids + out)[-c["max_position_embeddings"]:])[-1]
        order = np.argsort(-logits, kind="stable")
        pick = order[0]
        if temperature > 0:
            p = np.exp(log_softmax(logits[order] / temperature))
            keep = np.cumsum(p) - p < top_p
            pick = random.choice(order[keep], p=p[keep] / p[keep].sum())
        out.append(int(pick))
        logprobs.append(float(log_softmax(logits)[pick]))
        margins.append(float(logits[order[0]] - logits[order[1]]))
        if out[-1] == c["eos_token_id"]:
            break
    return out, logprobs, margins


def reference(c, w, tokenizer, text, count=48, windows=16, length=256):
    bos = [c["bos_token_id"]]
    result = {"about": "float64 forward of the f16 weights; see reference.py", "greedy": [], "windows": []}
    for prompt in PROMPTS:
        ids = bos + tokenizer.encode(prompt)
        out, logprobs, margins = generate(c, w, ids, count)
        result["greedy"].append({"prompt": prompt, "prompt_ids": ids, "output_ids": out,
                                 "output": tokenizer.decode(ids + out)[len(prompt):],
                                 "logprobs": logprobs, "margins": margins})
    # A window is `length` ids and starts with <s>, as a fresh request does; the NLL is over the length - 1 ids after it.
    stream = [i for story in text.split("<|story|>") for i in tokenizer.encode(story.strip("\n"))]
    step = (len(stream) - length) // windows
    for n in range(windows):
        ids = bos + stream[n * step:n * step + length - 1]
        nll = -log_softmax(forward(c, w, ids)[:-1])[np.arange(length - 1), ids[1:]]
        result["windows"].append({"ids": ids, "mean_nll": float(nll.mean())})
    result["mean_nll"] = float(np.mean([x["mean_nll"] for x in result["windows"]]))
    return result


def dump(value):
    """JSON with one line for each list of numbers."""
    import re
    text = json.dumps(value, indent=1)
    return re.sub(r"\[\s+([-\d.,e\s]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="folder with model.safetensors, config.json, tokenizer.model")
    p.add_argument("--prompt", default="Once upon a time")
    p.add_argument("--tokens", type=int, default=120)
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    p.add_argument("--top-p", type=float, default=0.9)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--write", metavar="FILE", help="write the reference for the tests instead")
    a = p.parse_args()
    c, w = load(a.model)
    tokenizer = spm.SentencePieceProcessor(model_file=os.path.join(a.model, "tokenizer.model"))
    if a.write:
        with open(os.path.join(a.model, "valid_sample.txt"), encoding="utf-8") as f:
            text = dump(reference(c, w, tokenizer, f.read()))
        with open(a.write + ".tmp", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(a.write + ".tmp", a.write)
    else:
        ids = [c["bos_token_id"]] + tokenizer.encode(a.prompt)
        print(tokenizer.decode(ids + generate(c, w, ids, a.tokens, a.temperature, a.top_p, a.seed)[0]))


if __name__ == "__main__":
    main()
