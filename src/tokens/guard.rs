//! Calls of the tokenizers library, which panics at some files that it has read without complaint.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Whether this thread is in [`guarded`], where a panic becomes an error.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// What `call` gives, its error in words; where it panics that is an error too, and nothing is printed.
pub(super) fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    keep_panics_quiet();
    let before = GUARDED.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(call));
    GUARDED.set(before);
    match outcome {
        Ok(outcome) => outcome.map_err(|e| e.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or_default();
            let first = text.lines().next().unwrap_or_default();
            Err(format!("something in it makes no sense to the tokenizers library ({first})"))
        }
    }
}

/// Makes panics say nothing in [`guarded`]; all others are said as before.
fn keep_panics_quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let loud = take_hook();
        set_hook(Box::new(move |panic| {
            if !GUARDED.get() {
                loud(panic);
            }
        }));
    });
}
