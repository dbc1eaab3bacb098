//! Where pages lie: in memory, or one after another in a file behind a header.

use super::{Geometry, Precision, StoreError};
use std::cell::RefCell;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of a file before its first page.
const HEADER: usize = 4096;
/// First bytes of a file; the number is the format's version.
const MAGIC: &str = "rambac chunk store 1\n";

/// Memory, or a file.
pub(super) enum Pages {
    Ram { pages: Vec<Vec<u8>>, page: usize },
    File { path: PathBuf, file: File, page: usize, stay: Stay },
}

/// What becomes of a file when nobody uses it any more.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stay {
    /// Its name is gone already: the system takes it back even from a process that is killed.
    Never,
    /// It goes unless it is kept: nothing could go on with it.
    Unless,
    Always,
}

impl Drop for Pages {
    fn drop(&mut self) {
        if let Pages::File { path, stay: Stay::Unless, .. } = self {
            // It may be on the disk no more; there is nobody left to tell.
            let _ = std::fs::remove_file(path);
        }
    }
}

thread_local! {
    /// What a thread has just read.
    static BYTES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn page_bytes(g: Geometry) -> usize {
    g.page() * g.precision.bytes()
}

/// A header: the magic line and the geometry, so that a look at the file tells what it is.
fn header(g: Geometry) -> Vec<u8> {
    let Geometry { heads, chunk, dim, landmark_dim, precision } = g;
    let text = format!(
        "{MAGIC}heads {heads} chunk {chunk} dim {dim} landmark {landmark_dim} page {} {}\n",
        super::PAGE,
        precision.name()
    );
    let mut bytes = text.into_bytes();
    bytes.resize(HEADER, 0);
    bytes
}

/// Two processes that append to one file would ruin it.
fn lock(path: &Path, file: &File) -> Result<(), StoreError> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked { path: path.into() }),
        // Some network file systems have no locks.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

/// The second line of a header.
fn geometry_line(header: &[u8]) -> String {
    let text = String::from_utf8_lossy(&header[MAGIC.len()..]);
    text.lines().next().unwrap_or_default().to_string()
}

impl Pages {
    pub(super) fn ram(g: Geometry) -> Self {
        Pages::Ram { pages: vec![], page: page_bytes(g) }
    }

    /// A new file, which goes with its pages unless they are [kept](Self::keep); with `scratch` it has no name from the
    /// start.
    pub(super) fn create(path: &Path, g: Geometry, scratch: bool) -> Result<Self, StoreError> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).map_err(|e| {
            if e.kind() == io::ErrorKind::AlreadyExists {
                StoreError::Exists { path: path.into() }
            } else {
                StoreError::io(path, "make it")(e)
            }
        })?;
        let mut pages = Pages::File { path: path.into(), file, page: page_bytes(g), stay: Stay::Unless };
        let Pages::File { file, stay, .. } = &mut pages else { unreachable!("BUG: made above") };
        lock(path, file)?;
        file.write_all_at(&header(g), 0).map_err(StoreError::io(path, "write it"))?;
        if scratch {
            std::fs::remove_file(path).map_err(StoreError::io(path, "take its name away"))?;
            *stay = Stay::Never;
        }
        Ok(pages)
    }

    pub(super) fn open(path: &Path, g: Geometry, chunks: usize) -> Result<Self, StoreError> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(StoreError::io(path, "open it"))?;
        let mut found = vec![0; HEADER];
        let no_store = || StoreError::NoStore { path: path.into() };
        lock(path, &file)?;
        file.read_exact_at(&mut found, 0).map_err(|_| no_store())?;
        if !found.starts_with(MAGIC.as_bytes()) {
            return Err(no_store());
        }
        let wanted = header(g);
        if found != wanted {
            for other in [Precision::Bf16, Precision::F32] {
                if found == header(Geometry { precision: other, ..g }) {
                    let (found, wanted) = (other.name(), g.precision.name());
                    return Err(StoreError::Precision { path: path.into(), found, wanted });
                }
            }
            let (found, expected) = (geometry_line(&found), geometry_line(&wanted));
            return Err(StoreError::Geometry { path: path.into(), found, expected });
        }
        let page = page_bytes(g);
        let have = file.metadata().map_err(StoreError::io(path, "ask for its length"))?.len();
        // The last value of the last chunk lies furthest back.
        let of_last = g.heads * g.chunk * g.dim * g.precision.bytes();
        let need = match chunks {
            0 => HEADER,
            n => HEADER + (n - 1) / super::PAGE * page + page - (super::PAGE - 1 - (n - 1) % super::PAGE) * of_last,
        };
        if have < need as u64 {
            return Err(StoreError::Torn { path: path.into(), chunks, expected: need as u64, found: have });
        }
        Ok(Pages::File { path: path.into(), file, page, stay: Stay::Always })
    }

    /// Pages over any file.
    #[cfg(test)]
    pub(super) fn over(path: &Path, g: Geometry) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Pages::File { path: path.into(), file, page: page_bytes(g), stay: Stay::Always })
    }

    /// The file, if it is one.
    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            Pages::Ram { .. } => None,
            Pages::File { path, .. } => Some(path),
        }
    }

    /// The file, if it is one that others can open.
    pub(super) fn name(&self) -> Option<&Path> {
        self.path().filter(|_| !matches!(self, Pages::File { stay: Stay::Never, .. }))
    }

    pub(super) fn clear(&mut self) -> Result<(), StoreError> {
        match self {
            Pages::Ram { pages, .. } => pages.clear(),
            Pages::File { path, file, .. } => {
                file.set_len(HEADER as u64).map_err(StoreError::io(path, "shorten it"))?;
            }
        }
        Ok(())
    }

    pub(super) fn flush(&self) -> Result<(), StoreError> {
        match self {
            Pages::Ram { .. } => Ok(()),
            Pages::File { path, file, .. } => file.sync_data().map_err(StoreError::io(path, "flush it to the disk")),
        }
    }

    /// From now on a file with a name stays.
    pub(super) fn keep(&mut self) {
        if let Pages::File { stay: stay @ Stay::Unless, .. } = self {
            *stay = Stay::Always;
        }
    }

    pub(super) fn write(&mut self, number: usize, at: usize, bytes: &[u8]) -> Result<(), StoreError> {
        match self {
            Pages::Ram { pages, page } => {
                if number == pages.len() {
                    pages.push(vec![0; *page]);
                }
                pages[number][at..at + bytes.len()].copy_from_slice(bytes);
                Ok(())
            }
            Pages::File { path, file, page, .. } => file
                .write_all_at(bytes, (HEADER + number * *page + at) as u64)
                .map_err(StoreError::io(path, "write it")),
        }
    }

    /// Hands `len` bytes of a page to `f`; zeros if they can't be read.
    pub(super) fn read(&self, number: usize, at: usize, len: usize, f: impl FnOnce(&[u8])) -> io::Result<()> {
        match self {
            Pages::Ram { pages, .. } => {
                f(&pages[number][at..at + len]);
                Ok(())
            }
            Pages::File { file, page, .. } => BYTES.with_borrow_mut(|bytes| {
                bytes.resize(bytes.len().max(len), 0);
                let bytes = &mut bytes[..len];
                let read = file.read_exact_at(bytes, (HEADER + number * page + at) as u64);
                if read.is_err() {
                    bytes.fill(0);
                }
                f(bytes);
                read
            }),
        }
    }
}
