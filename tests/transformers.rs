//! Stock checkpoints as transformers sees them: loaded without a missing or unexpected tensor, and with our logits.
//! Runs `tests/transformers_agrees.py` where a Python with torch and transformers is found (`PYTHON`, else `python3`).

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{data, generate};

/// Status with which the script says that it cannot run here.
const SKIPPED: i32 = 77;

/// All without a group limit, which does not let deepseek_v2 keep three experts.
const MODELS: [&str; 47] = [
    "mixtral",
    "mixtral_sliding_window",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe_fused",
    "olmoe_clip",
    "granitemoe",
    "granitemoeshared",
    "granitemoeshared_fused",
    "granitemoehybrid",
    "granitemoehybrid_mamba",
    "granitemoehybrid_mamba_fused",
    "granitemoe_swa",
    "jamba",
    "jamba_fused",
    "nemotron_h",
    "minimax_m2",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm_moe_dsa",
    "hunyuan_v1_moe",
    "cohere2_moe",
    "cohere2_moe_fused",
    "aria",
    "dbrx",
    "flex_olmo",
    "gemma4",
    "gemma4_text",
    "afmoe",
    "solar_open",
    "exaone_moe",
    "hy_v3",
    "hy_v3_fused",
    "mimo_v2_flash",
    "laguna",
    "laguna_fused",
    "mellum",
    "qwen3_omni_moe_fused",
    "qwen3_vl_moe",
    "qwen3_vl_moe_fused",
    "llama4_text",
    "qwen3_next",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "lfm2_moe",
    "lfm2_moe_fused",
    "kimi_linear",
];

fn moepress(arguments: &[&str], dir: &Path) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_moepress")).args(arguments).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn transformers_loads_the_stock_layout_and_agrees() {
    let dir = tempfile::tempdir().unwrap();
    generate::tokens(&dir.path().join("tokens"), 3, 24, 64);
    let mut arguments: Vec<PathBuf> = Vec::new();
    let plans: [(&str, &[&str]); 2] = [
        ("dropped", &["--method", "reap", "--experts", "3"]),
        ("densified", &["--method", "low-rank", "--remove", "0.3", "--set", "whiten=false"]),
    ];
    for name in MODELS {
        let model = data(name).display().to_string();
        let statistics = format!("{name}.statistics");
        moepress(&["calibrate", &model, "--tokens", "tokens", "--out", &statistics], dir.path());
        for (kind, plan) in plans {
            let at = |suffix: &str| format!("{name}.{kind}{suffix}");
            moepress(&[&["plan", "--stats", &statistics, "--out", &at(".json")], plan].concat(), dir.path());
            let compress = ["compress", &model, "--plan", &at(".json"), "--layout", "hf", "--densify"];
            moepress(&[&compress[..], &["--out", &at("")]].concat(), dir.path());
            moepress(&["run", &at(""), "--tokens", "tokens", "--out", &at(".logits")], dir.path());
            arguments.extend([at(""), at(".logits"), "tokens".into()].map(|path| dir.path().join(path)));
        }
    }
    let python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transformers_agrees.py");
    let Ok(output) = Command::new(python).arg(script).args(&arguments).output() else {
        eprintln!("skipped: there is no Python");
        return;
    };
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => {}
        Some(SKIPPED) => eprintln!("{}", text.trim()),
        _ => panic!("{text}"),
    }
}
