//! What happens when a file is cut off under its memory map.
//!
//! A read beyond the new end of the file is no error code but a signal, SIGBUS, and kills the process without a word.
//! [`signals_become_messages`] lets the process end with a message and a status instead. The data cannot be made whole again,
//! and results that were begun with it are worth nothing, so ending is all that can be done; what is on disk is as after
//! a run that was killed.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// Maps that are known by name at one time; further ones are reported without it.
const SLOTS: usize = 4096;

/// A mapped file. The text is never freed, because a signal may come at any time.
struct Slot {
    start: AtomicUsize,
    length: AtomicUsize,
    text: AtomicPtr<Vec<u8>>,
}

static MAPS: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        length: AtomicUsize::new(0),
        text: AtomicPtr::new(std::ptr::null_mut()),
    }
}; SLOTS];
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// The place of a map in the table; gives it back when dropped.
#[derive(Debug)]
pub(super) struct Watch(Option<usize>);

impl Watch {
    /// Watches `map`, which holds the file `path`.
    pub(super) fn new(map: &[u8], path: &std::path::Path) -> Self {
        if !INSTALLED.load(Ordering::Relaxed) {
            return Watch(None);
        }
        let free =
            |slot: &Slot| slot.start.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let Some(at) = MAPS.iter().position(free) else { return Watch(None) };
        let text = format!("error: {}: was cut off while it was being read\n", path.display());
        MAPS[at].text.store(Box::into_raw(Box::new(text.into_bytes())), Ordering::Release);
        MAPS[at].length.store(map.len(), Ordering::Release);
        MAPS[at].start.store(map.as_ptr() as usize, Ordering::Release);
        Watch(Some(at))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(at) = self.0 {
            MAPS[at].length.store(0, Ordering::Release);
            MAPS[at].start.store(0, Ordering::Release);
        }
    }
}

/// From now on a file that is cut off while it is mapped ends the process with status 1 and one line on standard error
/// that names it, and a file that may not grow further (`ulimit -f`) is an error of the write and no signal. For programs,
/// which own their signals; a library leaves them alone. Interrupted or terminated, the process removes the files that it has not
/// finished.
#[cfg(unix)]
#[expect(unsafe_code, reason = "a signal handler")]
pub fn signals_become_messages() {
    INSTALLED.store(true, Ordering::Relaxed);
    // SAFETY: an all-zero `sigaction` is a valid one; the handler has the signature that SA_SIGINFO asks for and does
    // only what is allowed inside a signal.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
    super::interrupt::watch();
}

/// Nothing is known of other systems.
#[cfg(not(unix))]
pub fn signals_become_messages() {}

#[cfg(unix)]
#[expect(unsafe_code, reason = "a signal handler")]
extern "C" fn on_fault(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `info`; atomics, `write` and `_exit` are allowed inside a signal; texts are never
    // freed.
    unsafe {
        let address = (*info).si_addr() as usize;
        let mut text: &[u8] = b"error: a file was cut off while it was being read\n";
        for slot in &MAPS {
            let (start, length) = (slot.start.load(Ordering::Acquire), slot.length.load(Ordering::Acquire));
            if address.wrapping_sub(start) < length
                && let Some(known) = slot.text.load(Ordering::Acquire).as_ref()
            {
                text = known;
            }
        }
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        libc::_exit(1);
    }
}
