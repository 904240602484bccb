//! What the emulation says of kernels that a GPU would hang on, or run wrongly and silently.

use std::path::Path;

use crate::emulator::{self, Emulator, Mode};

#[test]
fn mistakes_have_messages() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulation/mistakes");
    let scratch = tempfile::tempdir().unwrap();
    let Some(kernels) = emulator::build(&folder, None, scratch.path()) else { return };
    let kernels: &'static emulator::Kernels = Box::leak(Box::new(kernels));
    for mode in [Mode::Late, Mode::Early, Mode::Random(1)] {
        let gpu = Emulator { kernels, replaced: None, mode, multiprocessors: 1 };
        let out = gpu.room(64 * 4);
        let run = |name: &str, threads: u32, shared: u32| {
            gpu.run(name, [1, 1, 1], [threads, 1, 1], shared, &out.address().to_le_bytes())
        };
        for (name, threads, shared, expected) in [
            (
                "barrier_in_a_branch",
                64,
                0,
                "deadlock in block (0, 0, 0): 24 at __shfl_sync mistakes.cu:11, 40 at __syncthreads mistakes.cu:10",
            ),
            ("two_barriers", 64, 0, "while other threads of the block wait in the one at line "),
            ("shuffle_after_an_exit", 32, 0, ""),
            ("shuffle_from_outside", 32, 0, "reads lane 20, which takes no part"),
            ("divergent_warp", 32, 0, "divergent warp"),
            ("copy_never_waited_for", 32, 16, "copies that were never waited for"),
            ("copy_to_odd_place", 32, 32, "shared offset 8 is not 16-byte aligned"),
            ("outside_of_shared", 32, 256, "outside of 256 bytes"),
            ("outside_of_global", 32, 0, "access to global memory of 256 bytes at byte"),
            ("calls_what_is_not_there", 32, 0, "access to global memory of 256 bytes at byte"),
            ("reads_what_may_not_be_there_yet", 32, 0, "before the previous kernel was waited for"),
            ("meets_before_it_waits", 64, 0, "before the previous kernel was waited for"),
            ("one_thread_does_not_wait", 32, 0, "without having waited for the previous kernel"),
        ] {
            let error = run(name, threads, shared).unwrap_err();
            assert!(error.starts_with(name) && error.contains(expected), "{mode:?}: {error}");
        }
        run("reads_poison", 32, 128).unwrap();
        assert!(out.read::<i32>()[..32].iter().all(|&value| value == -1));
    }
}
