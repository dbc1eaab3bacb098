//! Large pages under memory that is read over and over, such as weights in decoding.
//!
//! With pages of 4 KiB a good part of the time of a long read goes to finding where the next page lies, more so in a
//! virtual machine.  Linux gives pages of 2 MiB to who asks; other systems are left alone.  It is a request: what
//! is not granted stays as it was.

/// Addresses nearer to each other than this, a large page, are seen as one range: allocations lie side by side, and a
/// smaller hole would leave both its neighbours without the page that it lies in.
#[cfg(target_os = "linux")]
const NEAR: usize = 1 << 21;

/// Asks for large pages under `parts`, (first byte, bytes).  Only pages that lie wholly in a range of neighbouring parts
/// can be large; what else lies in the gaps between them is asked for too, which changes nothing but its pages.
pub fn prefer(parts: impl IntoIterator<Item = (*const u8, usize)>) {
    #[cfg(target_os = "linux")]
    {
        let mut parts: Vec<(usize, usize)> = parts.into_iter().map(|(p, n)| (p.addr(), p.addr() + n)).collect();
        parts.sort_unstable();
        let mut ranges: Vec<(usize, usize)> = vec![];
        for (start, end) in parts {
            match ranges.last_mut() {
                Some(last) if start <= last.1 + NEAR => last.1 = last.1.max(end),
                _ => ranges.push((start, end)),
            }
        }
        // SAFETY: asks for a constant.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(1) as usize;
        for (start, end) in ranges {
            let (start, end) = (start / page * page, end.next_multiple_of(page));
            for advice in [libc::MADV_HUGEPAGE, libc::MADV_COLLAPSE] {
                // SAFETY: both kinds of advice leave the contents of memory as they are; an error means that it was not
                // taken.
                unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(start), end - start, advice) };
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    drop(parts);
}
