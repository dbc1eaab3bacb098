//! Huge pages for large memory: a training step walks hundreds of MiB, and with pages of 4 KiB it waits for their
//! addresses as well as for the data.

/// The size of a huge page on x86-64, and on AArch64 with small pages of 4 KiB.
pub const HUGE: usize = 2 << 20;

/// Asks for huge pages in `ptr..ptr + len`, which nothing has touched yet.  A wish: where the system has none, nothing
/// changes.
pub fn prefer_huge(ptr: *mut u8, len: usize) {
    let skip = ptr.align_offset(HUGE);
    let whole = len.saturating_sub(skip) / HUGE * HUGE;
    #[cfg(target_os = "linux")]
    if whole > 0 {
        // SAFETY: whole pages of the caller's memory; the advice changes no contents.
        unsafe { libc::madvise(ptr.add(skip).cast(), whole, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = whole;
}
