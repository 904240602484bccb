#!/usr/bin/env python3
"""Check logits written by `moepress run` against transformers.

    moepress run MODEL --tokens TOKENS.safetensors --out LOGITS.safetensors
    transformers_agrees.py MODEL LOGITS.safetensors TOKENS.safetensors [MODEL LOGITS TOKENS ...]

Each MODEL folder is loaded with AutoModelForCausalLM, or as a model of text and images, in float32 with eager attention, run on the `ids` of
its token file, window by window, and compared with the `logits` of the output file.  A case fails when

  * transformers reports missing, unexpected or mismatched weights, or cannot load the folder,
  * the logits have another shape or contain a number that is not finite,
  * any logit differs by more than the tolerance (1e-4).

Where the token file has a `mask`, positions with 0 (padding, which comes last in a window) are not compared.
One line per case, then `N passed, M failed`.  Exit status: 0 all passed, 1 some failed, 2 wrong usage,
77 skipped, with a line `skipped: …`, because torch, transformers or safetensors is not installed.

deepseek_v2 with YaRN needs a transformers that squares mscale into the softmax scale (5.17 does, 4.57 does not).
"""

import argparse
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

SKIPPED = 77


class Disagreement(Exception):
    """A case failed; the message says how."""


def load(torch, transformers, folder):
    """The model, with every weight of the folder used and none made up."""
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise Disagreement("no config.json there")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type == "dbrx":
        # transformers reads this number and then rotates by its default.
        config.rope_parameters = {"rope_type": "default", "rope_theta": config.attn_config.rope_theta}
    of_images = hasattr(config, "vision_config")
    kind = transformers.AutoModelForImageTextToText if of_images else transformers.AutoModelForCausalLM
    if hasattr(config, "thinker_config"):
        kind = transformers.AutoModelForMultimodalLM
    model, info = kind.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        ignore_mismatched_sizes=True,  # reported below, by name
        output_loading_info=True,
    )
    wrong = []
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = sorted(str(name) for name in info.get(what) or ())
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            wrong.append(f"{what.replace('_', ' ')}: {', '.join(names[:3])}{more}")
    if wrong:
        raise Disagreement("; ".join(wrong))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # expert by expert, not through a grouped kernel
    # A model that may speak has no forward pass of its own.
    return getattr(model, "thinker", model).eval()


def tensor(load_file, file, name):
    tensors = load_file(file)
    if name not in tensors:
        raise Disagreement(f"{file}: no tensor `{name}`, only {', '.join(sorted(tensors)) or 'none'}")
    return tensors[name]


def compare(torch, transformers, load_file, folder, logits_file, tokens_file, tolerance):
    """The largest difference of one case and a description of its size."""
    ids = tensor(load_file, tokens_file, "ids").long()
    ours = tensor(load_file, logits_file, "logits")
    mask = load_file(tokens_file).get("mask")
    if ids.dim() != 2:
        raise Disagreement(f"{tokens_file}: ids is {list(ids.shape)}, not [windows, length]")
    if ids.numel() == 0:
        raise Disagreement(f"{tokens_file}: no tokens, so nothing would be compared")
    if ours.dtype != torch.float32:
        raise Disagreement(f"{logits_file}: logits is {ours.dtype}, not float32")
    if ours.dim() != 3 or ours.shape[:2] != ids.shape:
        raise Disagreement(f"{logits_file}: logits is {list(ours.shape)} for ids {list(ids.shape)}")
    if mask is not None and mask.shape != ids.shape:
        raise Disagreement(f"{tokens_file}: mask is {list(mask.shape)} for ids {list(ids.shape)}")

    model = load(torch, transformers, folder)
    worst, place, compared = -1.0, None, 0
    for window in range(ids.shape[0]):
        with torch.no_grad():
            theirs = model(input_ids=ids[window : window + 1], use_cache=False).logits[0].float()
        if theirs.shape != ours[window].shape:
            raise Disagreement(f"vocabulary of {ours.shape[2]}, transformers has {theirs.shape[1]}")
        difference = (theirs.double() - ours[window].double()).abs().max(dim=1).values
        if mask is not None:
            difference = difference[mask[window] != 0]
        compared += difference.numel()
        if not torch.isfinite(difference).all():
            raise Disagreement(f"window {window}: a logit is not finite")
        if difference.numel() and difference.max().item() > worst:
            worst, place = difference.max().item(), (window, int(difference.argmax()))
    if not compared:
        raise Disagreement(f"{tokens_file}: every position is masked, so nothing was compared")
    size = f"{compared} tokens, {model.config.model_type}"
    if worst > tolerance:
        raise Disagreement(f"logits differ by {worst:.2e} (window {place[0]}, position {place[1]}; {size})")
    return worst, size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="MODEL LOGITS TOKENS", help="any number of such triples")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference allowed (default 1e-4)")
    arguments = parser.parse_args()
    if len(arguments.files) % 3:
        parser.error(f"{len(arguments.files)} paths; give triples MODEL LOGITS TOKENS")

    try:
        import torch
        import transformers
        from safetensors.torch import load_file
    except ImportError as missing:
        print(f"skipped: {missing}")
        return SKIPPED
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()

    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    passed = failed = 0
    for i in range(0, len(arguments.files), 3):
        folder, logits_file, tokens_file = arguments.files[i : i + 3]
        try:
            worst, size = compare(torch, transformers, load_file, folder, logits_file, tokens_file, arguments.tolerance)
        except Exception as error:  # one bad case must not hide the others
            reason = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, Disagreement):
                reason = f"{type(error).__name__}: {reason}"
            print(f"FAIL {folder}: {reason}", flush=True)
            failed += 1
        else:
            print(f"ok   {folder}: largest difference {worst:.2e} ({size})", flush=True)
            passed += 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
