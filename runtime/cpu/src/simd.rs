//! The instruction set that every kernel runs on: chosen once per process, here and nowhere else.
//!
//! The best one that the machine has, or the one that `RAMBAC_SIMD` names: results of different machines can then be
//! compared, and every path be tested on one machine.  Bits depend on it, as sums run over vectors of its length.
//! Deliberately absent: a choice per kernel or per call.

use pulp::{Arch, WithSimd};
use std::sync::OnceLock;

/// The environment variable that chooses.
pub const VARIABLE: &str = "RAMBAC_SIMD";

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// No vector instructions beyond what the compiler may always assume.
    Portable,
    /// x86-64 with AVX2 and FMA: 8 lanes of f32.
    Avx2,
    /// x86-64 with AVX-512 F, BW, CD, DQ and VL: 16 lanes.
    Avx512,
    /// AArch64: 4 lanes.
    Neon,
}

/// Why [`choose`] refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimdError {
    #[error("{VARIABLE}={given} names no instruction set; it may be {}", names(Level::ALL))]
    Unknown { given: String },
    #[error("{VARIABLE}={given}, but this processor cannot run {given}; it may be {}", names(available()))]
    Unsupported { given: &'static str },
}

fn names(levels: impl IntoIterator<Item = Level>) -> String {
    levels.into_iter().map(Level::name).collect::<Vec<_>>().join(", ")
}

impl Level {
    /// All of them, the slowest first.
    pub const ALL: [Level; 4] = [Level::Portable, Level::Neon, Level::Avx2, Level::Avx512];

    /// As [`VARIABLE`] names it.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Neon => "neon",
        }
    }

    /// `None`: this processor lacks it.
    fn arch(self) -> Option<Arch> {
        match self {
            Level::Portable => Some(Arch::Scalar),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => pulp::x86::V3::try_new().map(Arch::V3),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => pulp::x86::V4::try_new().map(Arch::V4),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => pulp::aarch64::Neon::try_new().map(Arch::Neon),
            _ => None,
        }
    }
}

/// The levels that this processor can run, the best one last.
pub fn available() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|l| l.arch().is_some())
}

/// What `wanted` asks for; nothing asks for the best.
fn pick(wanted: Option<&str>) -> Result<(Level, Arch), SimdError> {
    let level = match wanted {
        None => available().last().unwrap_or(Level::Portable),
        Some(name) => Level::ALL
            .into_iter()
            .find(|l| l.name() == name)
            .ok_or_else(|| SimdError::Unknown { given: name.to_string() })?,
    };
    level.arch().map(|arch| (level, arch)).ok_or(SimdError::Unsupported { given: level.name() })
}

fn chosen() -> &'static Result<(Level, Arch), SimdError> {
    static CHOSEN: OnceLock<Result<(Level, Arch), SimdError>> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let wanted = std::env::var_os(VARIABLE).filter(|w| !w.is_empty());
        pick(wanted.map(|w| w.to_string_lossy().into_owned()).as_deref())
    })
}

/// The level that kernels run on.  The first call reads the environment; a command makes it before anything else.
///
/// # Errors
/// [`VARIABLE`] names no level, or one that this processor lacks.
pub fn choose() -> Result<Level, SimdError> {
    chosen().as_ref().map(|(level, _)| *level).map_err(Clone::clone)
}

/// The chosen level for kernels; panics with [`choose`]'s error where nobody asked for it before.
#[inline]
pub(crate) fn arch() -> Arch {
    match chosen() {
        Ok((_, arch)) => *arch,
        Err(e) => panic!("{e}"),
    }
}

/// Runs `op` on the chosen level.
#[inline]
pub fn dispatch<Op: WithSimd>(op: Op) -> Op::Output {
    arch().dispatch(op)
}

/// For tests of any crate whose code runs on these kernels.
#[cfg(any(test, feature = "testing"))]
pub mod testing {
    use super::{Level, VARIABLE, available, choose};
    use std::io::Write;
    use std::process::Command;

    /// Runs this test binary again on every other level that the processor has, and says aloud which it lacks: the
    /// tests whose path contains `filter`, except `own`, which is the path of the calling test.
    ///
    /// # Panics
    /// A test fails on some level.
    pub fn rerun(own: &str, filter: &str) {
        let mut err = std::io::stderr();
        for level in Level::ALL.into_iter().filter(|l| Ok(*l) != choose()) {
            if !available().any(|l| l == level) {
                // Not by `eprintln!`, which the test harness keeps to itself.
                let _ = writeln!(err, "{own}: this processor has no {}: its paths are not tested", level.name());
                continue;
            }
            let exe = std::env::current_exe().expect("the test binary's path");
            let run = Command::new(exe).args([filter, "--skip", own]).env(VARIABLE, level.name()).output();
            let run = run.expect("the test binary runs again");
            let text = String::from_utf8_lossy(&run.stdout);
            assert!(run.status.success(), "on {}:\n{text}{}", level.name(), String::from_utf8_lossy(&run.stderr));
            let ran = text.lines().find(|l| l.starts_with("test result")).unwrap_or("BUG: no result");
            assert!(!ran.contains(" 0 passed"), "on {} no test ran: {ran}", level.name());
            println!("{}: {ran}", level.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simd_names_are_checked() {
        assert_eq!(pick(Some("portable")).map(|p| p.0), Ok(Level::Portable));
        assert_eq!(pick(None).map(|p| p.0).ok(), available().last());
        let e = pick(Some("sse9")).map(|p| p.0).unwrap_err().to_string();
        assert_eq!(e, "RAMBAC_SIMD=sse9 names no instruction set; it may be portable, neon, avx2, avx512");
        let foreign = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
        let e = pick(Some(foreign)).map(|p| p.0).unwrap_err().to_string();
        assert!(e.contains(&format!("cannot run {foreign}; it may be portable")), "{e}");
    }

    #[test]
    fn simd_every_level() {
        testing::rerun("simd::tests::simd_every_level", "");
    }
}
