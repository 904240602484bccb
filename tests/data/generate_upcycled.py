#!/usr/bin/env python3
"""Make dense checkpoints and the MoE checkpoints that upcycling makes of them, with reference outputs.

    python generate_upcycled.py [--out DIR]

dense/llama_{0,1,2} and dense/cohere_{0,1} are small random models as transformers writes them; golden.safetensors of
dense/llama_0 holds its logits.  bam_llama and bam_cohere are made of them as the paper says (BAM, arXiv 2408.08274, section
3): the second with one set of keys and values for all attentions.  transformers has no such model, so
golden.safetensors comes from its parts: every expert is an attention or an MLP of transformers, and this script mixes
them.  Weights are stored in bfloat16 and widened; everything is computed in float32.

The committed files were made with transformers 5.17.0, torch 2.15.0 (CPU) and safetensors 0.8.0.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from safetensors.torch import save_file
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

CLOSEST_CALL = 2e-5  # least difference between the expert taken and the next one

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "attn_implementation": "eager",
}

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, COMMON | {"head_dim": 12, "rms_norm_eps": 1e-5, "rope_theta": 50000.0}),
    "cohere": (CohereConfig, CohereForCausalLM, COMMON | {"logit_scale": 0.25, "layer_norm_eps": 1e-4, "rope_theta": 30000.0}),
}


def random_model(kind, seed):
    """A model of this kind; its weights are those of a bfloat16 checkpoint."""
    config_class, model_class, settings = KINDS[kind]
    model = model_class(config_class(**settings)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scaled = 1 + 0.2 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5
            parameter.copy_(scaled.bfloat16().float())
    return model


def stored(tensors):
    return {name: tensor.detach().bfloat16().contiguous().clone() for name, tensor in tensors.items()}


def save(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(stored(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def save_dense(folder, kind, model):
    config = {"architectures": [KINDS[kind][1].__name__], "model_type": kind, "torch_dtype": "bfloat16"}
    settings = {k: v for k, v in KINDS[kind][2].items() if k != "attn_implementation"}
    save(folder, config | settings, dict(model.named_parameters()))


def mean(tensors):
    """Rounded once, from float64."""
    return torch.stack([t.double() for t in tensors]).mean(0).bfloat16().float()


def side_by_side(tensors, parts, dim):
    """The heads of all experts: in turns, each with its heads of one part."""
    pieces = [t.chunk(parts, dim) for t in tensors]
    return torch.cat([expert[part] for part in range(parts) for expert in pieces], dim)


@torch.no_grad()
def bam(models, kind, shared, seed):
    """Tensors of the mixture and a function that computes it."""
    settings = KINDS[kind][2]
    states = [dict(m.named_parameters()) for m in models]
    parts = settings["num_key_value_heads"] if shared else 1
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name in states[0]:
        each = [state[name] for state in states]
        map_name = name.split(".")[-2]
        if ".mlp." in name:
            for e, tensor in enumerate(each):
                out[name.replace(".mlp.", f".mlp.experts.{e}.")] = tensor
        elif map_name in ("q_proj", "o_proj") or map_name in ("k_proj", "v_proj") and not shared:
            out[name] = side_by_side(each, parts, 1 if map_name == "o_proj" else 0)
        else:
            out[name] = mean(each)
    for l in range(settings["num_hidden_layers"]):
        for router in ("mlp.gate", "self_attn.router"):
            weight = torch.randn((len(models), settings["hidden_size"]), generator=generator) * 0.4
            out[f"model.layers.{l}.{router}.weight"] = weight.bfloat16().float()
    # The parts run with the means that they share.
    for model in models:
        for name, parameter in model.named_parameters():
            if name in out and out[name].shape == parameter.shape and ".mlp." not in name:
                if ".self_attn." not in name or shared and name.split(".")[-2] in ("k_proj", "v_proj"):
                    parameter.copy_(out[name])

    def run(ids):
        first = models[0].model
        positions = torch.arange(ids.shape[1])[None]
        x = first.embed_tokens(ids)
        rotation = first.rotary_emb(x, positions)
        mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        hidden, closest = [x], float("inf")
        for l in range(settings["num_hidden_layers"]):
            layers = [m.model.layers[l] for m in models]
            normed = layers[0].input_layernorm(x)
            gates = (normed @ out[f"model.layers.{l}.self_attn.router.weight"].T).softmax(-1)
            attended = [
                layer.self_attn(normed, position_embeddings=rotation, attention_mask=mask)[0] for layer in layers
            ]
            mixed = sum(gates[..., e, None] * attended[e] for e in range(len(models)))
            if kind == "llama":
                x = x + mixed
                normed, mixed = layers[0].post_attention_layernorm(x), 0
            scores = (normed @ out[f"model.layers.{l}.mlp.gate.weight"].T).softmax(-1)
            ranked = scores.sort(-1, descending=True)
            closest = min(closest, (ranked.values[..., 0] - ranked.values[..., 1]).min().item())
            outputs = torch.stack([layer.mlp(normed) for layer in layers], -2)
            chosen = ranked.indices[..., :1]
            best = outputs.gather(-2, chosen[..., None].expand(*chosen.shape, outputs.shape[-1]))[..., 0, :]
            x = x + mixed + ranked.values[..., :1] * best
            hidden.append(x)
        assert closest > CLOSEST_CALL, f"{kind}: a router decides by {closest}; take another seed"
        hidden[-1] = first.norm(x)
        head = out.get("lm_head.weight", out["model.embed_tokens.weight"])
        logits = hidden[-1] @ head.T * settings.get("logit_scale", 1.0)
        return {"logits": logits} | {f"hidden.{l}": h for l, h in enumerate(hidden)}

    return out, run


def save_golden(folder, ids, outputs):
    tensors = {name: tensor.detach().contiguous() for name, tensor in outputs.items()}
    save_file({"input_ids": ids} | tensors, folder / "golden.safetensors")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    out = parser.parse_args().out
    ids = torch.randint(0, COMMON["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))
    for kind, count, shared in [("llama", 3, False), ("cohere", 2, True)]:
        models = [random_model(kind, 100 + e) for e in range(count)]
        for e, model in enumerate(models):
            save_dense(out / "dense" / f"{kind}_{e}", kind, model)
        if kind == "llama":
            with torch.no_grad():
                save_golden(out / "dense" / "llama_0", ids, {"logits": models[0](ids).logits})
        tensors, run = bam(models, kind, shared, seed=7)
        config = {k: v for k, v in KINDS[kind][2].items() if v is not None and k != "attn_implementation"}
        config |= {
            "model_type": "bam",
            "dense_model_type": kind,
            "num_local_experts": count,
            "num_attention_experts": count,
            "num_experts_per_tok": 1,
            "shared_key_values": shared,
            "tie_word_embeddings": kind == "cohere",
        }
        save(out / f"bam_{kind}", config, tensors)
        with torch.no_grad():
            save_golden(out / f"bam_{kind}", ids, run(ids))


main()
