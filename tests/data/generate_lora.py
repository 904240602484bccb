"""Writes tests/data/lora: small LoRA adapters for the checkpoints beside them, and what the adapted models give.

Needs torch, transformers 5 and peft (made with 2.15, 5.17 and 0.21). Run in tests/data.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

EXPERTS = ["gate_up_proj", "down_proj"]


def adapter(name: str, experts: str, **config):
    """Random adapter of modules and of the fused experts; logits of the adapted model on the golden tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    parameters = [f"{experts}.{p}" for p in EXPERTS]
    model = get_peft_model(model, LoraConfig(target_parameters=parameters, **config))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    out = Path("lora") / name
    model.save_pretrained(out)
    (out / "README.md").unlink()
    path = out / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["base_model_name_or_path"] = name
    path.write_text(json.dumps(saved, indent=2) + "\n")
    ids = load_file(Path(name) / "golden.safetensors")["input_ids"][:2]
    with torch.no_grad():
        logits = model(input_ids=ids.long()).logits.float()
    save_file({"input_ids": ids.int().contiguous(), "logits": logits.contiguous()}, out / "golden.safetensors")


adapter("qwen3_moe", "mlp.experts", r=2, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "gate"])
adapter("gpt_oss", "mlp.experts", r=2, lora_alpha=4, target_modules=["o_proj"])
adapter("llama4_text", "feed_forward.experts", r=1, lora_alpha=4, target_modules=["v_proj"])
