//! Files under construction, removed when the process is told to end.
//!
//! A process that is interrupted (Ctrl-C) or terminated runs no destructors, so that half of a large file would stay beside
//! the place where it was to go. What can be taken up again, finished layers in `NAME.partial`, stays.

use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

/// Files that are under construction at one time; further ones stay when the process ends.
const SLOTS: usize = 64;

/// Paths, ended by a NUL byte. They are never freed, because a signal may come at any time.
static FILES: [AtomicPtr<Vec<u8>>; SLOTS] = [const { AtomicPtr::new(ptr::null_mut()) }; SLOTS];
static WATCHED: AtomicBool = AtomicBool::new(false);

/// The place of a file in the table; gives it back when dropped.
#[derive(Debug)]
pub(super) struct Unfinished(Option<usize>);

impl Unfinished {
    /// Notes `path`.
    #[cfg(unix)]
    pub(super) fn new(path: &Path) -> Self {
        use std::os::unix::ffi::OsStrExt as _;
        if !WATCHED.load(Ordering::Relaxed) {
            return Unfinished(None);
        }
        let path = [path.as_os_str().as_bytes(), b"\0"].concat();
        let path = Box::into_raw(Box::new(path));
        let free = |slot: &AtomicPtr<Vec<u8>>| {
            slot.compare_exchange(ptr::null_mut(), path, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        Unfinished(FILES.iter().position(free))
    }

    /// No file.
    pub(super) fn none() -> Self {
        Unfinished(None)
    }

    /// Nothing is known of other systems.
    #[cfg(not(unix))]
    pub(super) fn new(_: &Path) -> Self {
        Unfinished(None)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(at) = self.0 {
            FILES[at].store(ptr::null_mut(), Ordering::Release);
        }
    }
}

/// From now on the process removes unfinished files before a signal ends it. A signal that is ignored stays so.
#[cfg(unix)]
#[expect(unsafe_code, reason = "a signal handler")]
pub(super) fn watch() {
    WATCHED.store(true, Ordering::Relaxed);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: an all-zero `sigaction` is a valid one; the handler has the signature that is asked for without
        // SA_SIGINFO and does only what is allowed inside a signal.
        unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, ptr::null(), &raw mut before);
            if before.sa_sigaction == libc::SIG_IGN {
                continue;
            }
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_end as *const () as usize;
            // The second time the signal does what it always does.
            action.sa_flags = libc::SA_RESETHAND;
            libc::sigaction(signal, &raw const action, ptr::null_mut());
        }
    }
}

#[cfg(unix)]
#[expect(unsafe_code, reason = "a signal handler")]
extern "C" fn on_end(signal: libc::c_int) {
    for slot in &FILES {
        // SAFETY: texts end with a NUL byte and are never freed; `unlink` is allowed inside a signal.
        unsafe {
            if let Some(path) = slot.load(Ordering::Acquire).as_ref() {
                libc::unlink(path.as_ptr().cast());
            }
        }
    }
    // SAFETY: allowed inside a signal. Delivered when this returns, it ends the process as if nobody had watched.
    unsafe {
        libc::raise(signal);
    }
}
