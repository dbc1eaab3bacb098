//! What a kernel did wrong, and where.  [`shared`] and [`global`] keep the last accesses of every piece of memory, [`past`] what
//! threads know of others' accesses; this file says what a finding is and gathers them.

pub mod global;
pub mod past;
pub mod shared;

use crate::isa::{Place, Program};
use std::collections::BTreeMap;
use std::fmt;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    OutOfBounds,
    Misaligned,
    Uninitialised,
    ReadOnlyWrite,
    SharedRace,
    GlobalRace,
    /// A copy's destination, a product's result or its operands were touched before its wait.
    AsyncUnwaited,
    DivergentBarrier,
    /// A warp-wide instruction whose lanes didn't come together.
    DivergentWarp,
    Deadlock,
    /// Memory written by ordinary stores or `cp.async` is read by the asynchronous engine without a proxy fence.
    ProxyFence,
    /// A product uses registers that something else used, and no `wgmma.fence` stands between.
    ProductFence,
    /// An mbarrier that isn't one, or counts wrongly.
    Mbarrier,
    Trap,
    /// Operands that the instruction doesn't allow.
    Operand,
    /// What an earlier launch may still write was read, or anything written, before that was waited for.
    Early,
    /// Stopped at the limit of instructions.
    Limit,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::OutOfBounds => "out of bounds",
            Kind::Misaligned => "misaligned",
            Kind::Uninitialised => "uninitialised read",
            Kind::ReadOnlyWrite => "write to an input",
            Kind::SharedRace => "race in shared memory",
            Kind::GlobalRace => "race in global memory",
            Kind::AsyncUnwaited => "not waited for",
            Kind::DivergentBarrier => "divergent barrier",
            Kind::DivergentWarp => "divergent warp",
            Kind::Deadlock => "deadlock",
            Kind::ProxyFence => "missing proxy fence",
            Kind::ProductFence => "missing wgmma.fence",
            Kind::Mbarrier => "mbarrier",
            Kind::Trap => "trap",
            Kind::Operand => "operand",
            Kind::Early => "earlier launch not waited for",
            Kind::Limit => "limit of instructions",
        }
    }
}

/// One thing that is wrong, at one place; its first occurrence in order of block and thread.
#[derive(Clone, Debug)]
pub struct Finding {
    pub kind: Kind,
    pub kernel: String,
    /// Index of the instruction.
    pub pc: u32,
    pub place: Place,
    /// The place in words, with the source's name; empty until a device has said it.
    pub at: String,
    pub mnemonic: String,
    pub block: [u32; 3],
    pub thread: [u32; 3],
    pub address: Option<u64>,
    /// What happened, with the buffer's or variable's name.
    pub message: String,
    /// The other access of a race, where known.
    pub other: Option<Place>,
    /// How often.
    pub count: u64,
    /// For order: (block, thread) as numbers.
    pub(crate) rank: (u64, u32),
}

impl Finding {
    /// `kernel.cu:12` or, without line information, the PTX line.
    pub fn source(&self, files: &[(u32, String)]) -> String {
        place_name(&self.place, files)
    }
}

/// `name.cu:12 (inlined at 40), PTX line 7`
pub fn place_name(place: &Place, files: &[(u32, String)]) -> String {
    let Some(s) = place.source else { return format!("PTX line {}", place.line) };
    let file = files.iter().find(|f| f.0 == s.file).map_or("?", |f| f.1.rsplit('/').next().unwrap_or(&f.1));
    let inlined = s.inlined_at.map_or(String::new(), |(_, line)| format!(" (inlined at {line})"));
    format!("{file}:{}{inlined}, PTX line {}", s.line, place.line)
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [x, y, z] = self.block;
        let [tx, ty, tz] = self.thread;
        write!(f, "{}: {} [{} in {}", self.kind.name(), self.message, self.mnemonic, self.kernel)?;
        write!(f, ", block ({x}, {y}, {z}), thread ({tx}, {ty}, {tz})")?;
        if let Some(a) = self.address {
            write!(f, ", address 0x{a:x}")?;
        }
        match &*self.at {
            "" => write!(f, ", PTX line {}", self.place.line)?,
            at => write!(f, ", {at}")?,
        }
        if self.count > 1 {
            write!(f, ", {} times", self.count)?;
        }
        write!(f, "]")
    }
}

/// Findings by what they have in common: kind and both places.
#[derive(Default)]
pub struct Findings {
    all: BTreeMap<(Kind, u32, u32), Finding>,
}

/// Sites kept per kind of trouble; more say nothing new.
const MOST_SITES: usize = 1000;

/// Who did it.
#[derive(Clone, Copy)]
pub struct Who {
    pub block: [u32; 3],
    pub thread: [u32; 3],
    pub rank: (u64, u32),
}

impl Findings {
    /// Notes a finding; `message` is only made for a new first occurrence.
    #[allow(clippy::too_many_arguments)]
    pub fn add(
        &mut self,
        program: &Program,
        kind: Kind,
        pc: u32,
        other: Option<u32>,
        who: Who,
        address: Option<u64>,
        message: impl FnOnce() -> String,
    ) {
        // Which of two racing accesses comes second depends on the schedule.
        let race = matches!(kind, Kind::SharedRace | Kind::GlobalRace);
        let o = other.unwrap_or(u32::MAX);
        let key = if race && o != u32::MAX { (kind, pc.min(o), pc.max(o)) } else { (kind, pc, u32::MAX) };
        if let Some(f) = self.all.get_mut(&key) {
            f.count += 1;
            if who.rank >= f.rank {
                return;
            }
        } else if self.all.len() >= MOST_SITES {
            return;
        }
        let count = self.all.get(&key).map_or(1, |f| f.count);
        let finding = Finding {
            kind,
            kernel: program.name.clone(),
            pc,
            place: program.places[pc as usize],
            at: String::new(),
            mnemonic: program.mnemonics[pc as usize].clone(),
            block: who.block,
            thread: who.thread,
            address,
            message: message(),
            other: other.map(|o| program.places[o as usize]),
            count,
            rank: who.rank,
        };
        self.all.insert(key, finding);
    }

    /// Adds another worker's.
    pub fn merge(&mut self, more: Findings) {
        for (key, f) in more.all {
            match self.all.get_mut(&key) {
                None => {
                    self.all.insert(key, f);
                }
                Some(old) => {
                    let count = old.count + f.count;
                    if f.rank < old.rank {
                        *old = f;
                    }
                    old.count = count;
                }
            }
        }
    }

    pub fn list(self) -> Vec<Finding> {
        self.all.into_values().collect()
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
}
