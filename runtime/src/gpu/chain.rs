//! Several programs as one: what one keeps the next one reads, and the host has nothing to do in between.
//!
//! ```text
//! pinned memory ─ inputs ─→ program ─ kept ─→ program ─ kept ─→ program ─ results ─→ pinned memory
//!                 └───────────────────── one record of the device ───────────────────────┘
//! ```
//! The first run at given sizes starts everything by itself, the second makes a record of it all, copies from and to pinned
//! memory too; from the third on a run writes its inputs there, starts the record and waits: three calls, whatever the number
//! of kernels.  So all that changes from run to run must be in inputs and values, not in sizes.

use super::bound::{Bound, Place};
use super::bytes::Bytes;
use super::error::GpuError;
use super::machine::{Machine, Outcome, ProgramId, Record, device, span};
use super::run::{Ask, find};
use rambac_codegen::cuda::GpuProgram;
use rambac_driver::{BufferId, Device, Error, HostId};
use rambac_ir::Bindings;
use rambac_ir::ty::ConcreteTy;
use std::sync::Arc;

/// A program of a chain.
pub struct Link<'a> {
    pub program: ProgramId,
    pub dims: &'a Bindings,
    pub inputs: &'a [(&'a str, &'a Bytes)],
    /// Outputs that become values, and the values' names.
    pub keep: &'a [(&'a str, &'a str)],
    /// Outputs that are read; `None`: all.
    pub wanted: Option<&'a [&'a str]>,
}

impl Link<'_> {
    fn wants(&self, name: &str) -> bool {
        self.wanted.is_none_or(|w| w.contains(&name))
    }
}

/// Hears the number of a link, and name, type and bytes of a result.
pub type Read<'a> = dyn FnMut(usize, &str, &ConcreteTy, &[u8]) + 'a;

/// What tells chains apart: a program, its sizes, what it keeps and gives.
#[derive(PartialEq)]
struct Key {
    program: ProgramId,
    dims: Bindings,
    keep: Vec<(String, String)>,
    wanted: Option<Vec<String>>,
}

impl Key {
    fn is(&self, l: &Link) -> bool {
        let same = |(a, b): (&(String, String), &(&str, &str))| a.0 == b.0 && a.1 == b.1;
        let wanted = match (&self.wanted, l.wanted) {
            (Some(a), Some(b)) => a == b,
            (a, b) => a.is_none() && b.is_none(),
        };
        self.program == l.program
            && self.dims == *l.dims
            && wanted
            && self.keep.len() == l.keep.len()
            && self.keep.iter().zip(l.keep).all(same)
    }
    fn of(l: &Link) -> Key {
        let keep = l.keep.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
        let wanted = l.wanted.map(|w| w.iter().map(|n| n.to_string()).collect());
        Key { program: l.program, dims: l.dims.clone(), keep, wanted }
    }
}

/// Something between pinned memory and the device.
struct Moved {
    link: usize,
    name: String,
    ty: ConcreteTy,
    /// Byte of the pinned memory.
    at: usize,
    place: Place,
}

struct BoundLink {
    gpu: Arc<GpuProgram>,
    bound: Arc<Bound>,
    sources: Vec<BufferId>,
    /// From where to which value, and the bytes.
    kept: Vec<(Place, BufferId, usize)>,
}

/// A chain at given sizes.
pub(super) struct Chain {
    key: Vec<Key>,
    layout: u64,
    gone: u64,
    used: u64,
    links: Vec<BoundLink>,
    inputs: Vec<Moved>,
    results: Vec<Moved>,
    host: HostId,
    bytes: usize,
    record: Record,
    /// Results as they were read last.
    read: Vec<u8>,
}

impl<D: Device> Machine<D> {
    /// Chains that are kept.
    pub const CHAINS: usize = 8;

    /// Runs programs one after another; see the module's comment.  `read` hears the results that are wanted.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_chain(&mut self, links: &[Link], read: &mut Read) -> Outcome<()> {
        if self.waits() {
            return self.one_by_one(links, read);
        }
        self.tick += 1;
        let i = match self.known(links) {
            Some(i) if fits(&self.chains[i], links) && self.stands(i, links)? => i,
            _ => self.add_chain(links)?,
        };
        // Out of the machine while it runs: it is lost with its memory where something fails.
        let mut chain = self.chains.swap_remove(i);
        chain.used = self.tick;
        let done = self.run_chained(&mut chain, links);
        if let Err(e) = done {
            // What failed first is what counts.
            let _ = self.drop_chain(chain);
            return Err(e);
        }
        for r in &chain.results {
            read(r.link, &r.name, &r.ty, &chain.read[r.at..][..r.ty.bytes()]);
        }
        self.chains.push(chain);
        Ok(())
    }

    /// The chain of these programs at these sizes.
    fn known(&self, links: &[Link]) -> Option<usize> {
        let same = |c: &Chain| c.key.len() == links.len() && c.key.iter().zip(links).all(|(k, l)| k.is(l));
        self.chains.iter().position(same)
    }

    /// Whether what a chain was worked out for is where it was; names may have changed meanwhile, and changed back.
    fn stands(&mut self, i: usize, links: &[Link]) -> Outcome<bool> {
        if self.chains[i].layout == self.layout {
            return Ok(true);
        }
        if self.chains[i].gone != self.gone {
            return Ok(false);
        }
        for (at, l) in links.iter().enumerate() {
            let gpu = self.programs[l.program.0].gpu.clone();
            self.check(&gpu, l.dims, l.inputs)?;
            let ask = Ask { dims: l.dims, inputs: l.inputs, keep: l.keep, both: true };
            let sources = self.sources(l.program, &ask, &mut vec![])?;
            let own = &self.chains[i].links[at];
            let value =
                |name: &str| l.keep.iter().find(|(output, _)| *output == name).map(|(_, v)| self.values.get(*v));
            let kept = gpu.program.outputs.iter().filter(|o| !o.update).filter_map(|o| value(&o.name));
            if sources != own.sources || !kept.map(|v| v.map(|v| v.1)).eq(own.kept.iter().map(|k| Some(k.1))) {
                return Ok(false);
            }
        }
        self.chains[i].layout = self.layout;
        Ok(true)
    }

    fn one_by_one(&mut self, links: &[Link], read: &mut Read) -> Outcome<()> {
        for (i, l) in links.iter().enumerate() {
            let ask = Ask { dims: l.dims, inputs: l.inputs, keep: l.keep, both: true };
            let out = self.run_asked(l.program, &ask, None)?;
            out.iter().filter(|(n, _)| l.wants(n)).for_each(|(n, b)| read(i, n, &b.ty, &b.data));
        }
        Ok(())
    }

    fn run_chained(&mut self, c: &mut Chain, links: &[Link]) -> Outcome<()> {
        let name = c.links[0].gpu.program.name.clone();
        for m in &c.inputs {
            let value = links[m.link].inputs.iter().find(|(n, _)| *n == m.name).expect("BUG: `fits` looked").1;
            self.device.write_host(c.host, m.at, &value.data).map_err(device(&name, m.name.as_str()))?;
        }
        if c.record == Record::Second {
            let made = self.record(|e| whole(c, e), |m| m.start_chain(c))?;
            c.record = made.map_or(Record::Never, Record::Made);
        }
        if let Record::Made(r) = c.record {
            self.device.replay(r).and_then(|()| self.device.synchronise()).map_err(|e| whole(c, e))?;
        } else {
            let started = self.start_chain(c).map_err(|e| match e {
                // Of what was started before, in whichever link.
                GpuError::Device { error: error @ Error::Lost { finished: Some(_), .. }, .. } => blame(c, error),
                e => e,
            });
            started.and_then(|()| self.device.synchronise().map_err(|e| blame(c, e)))?;
            c.record = if c.record == Record::First { Record::Second } else { Record::Never };
        }
        self.device.read_host(c.host, 0, &mut c.read).map_err(device(&name, "results"))
    }

    fn start_chain(&mut self, c: &Chain) -> Outcome<()> {
        for (i, l) in c.links.iter().enumerate() {
            let name = &l.gpu.program.name;
            for m in c.inputs.iter().filter(|m| m.link == i) {
                let moved = self.device.upload((c.host, m.at), m.place, m.ty.bytes());
                moved.map_err(device(name, m.name.as_str()))?;
            }
            self.each(c.key[i].program, &l.gpu, &l.bound)?;
            for (from, to, bytes) in &l.kept {
                self.device.copy(*from, (*to, 0), *bytes).map_err(device(name, "what it keeps"))?;
            }
            for m in c.results.iter().filter(|m| m.link == i) {
                let moved = self.device.download(m.place, (c.host, m.at), m.ty.bytes());
                moved.map_err(device(name, m.name.as_str()))?;
            }
        }
        Ok(())
    }

    /// Works a chain out and keeps it; its place.
    fn add_chain(&mut self, links: &[Link]) -> Outcome<usize> {
        let stale = self.known(links);
        let oldest = (0..self.chains.len()).min_by_key(|&i| self.chains[i].used);
        if let Some(i) = stale.or(oldest.filter(|_| self.chains.len() >= Self::CHAINS)) {
            let old = self.chains.swap_remove(i);
            self.drop_chain(old)?;
        }
        // A value that finds no room, or a larger arena, moves what was bound before it.
        let mut bound = self.bind_chain(links)?;
        for _ in 0..links.len() + 1 {
            if bound.layout != self.layout {
                bound = self.bind_chain(links)?;
            }
        }
        assert!(bound.layout == self.layout, "BUG: links keep values of one name and several sizes");
        let name = &bound.links[0].gpu.program.name;
        let host = self.device.alloc_host("inputs and results", bound.bytes).map_err(device(name, "its operands"))?;
        self.chains.push(Chain { host, ..bound });
        Ok(self.chains.len() - 1)
    }

    /// A chain without its pinned memory.
    fn bind_chain(&mut self, links: &[Link]) -> Outcome<Chain> {
        let (layout, gone) = (self.layout, self.gone);
        let (mut all, mut inputs, mut results) = (vec![], vec![], vec![]);
        let mut temporary = vec![];
        for (i, l) in links.iter().enumerate() {
            let gpu = self.programs[l.program.0].gpu.clone();
            self.check(&gpu, l.dims, l.inputs)?;
            let ask = Ask { dims: l.dims, inputs: l.inputs, keep: l.keep, both: true };
            let sources = self.sources(l.program, &ask, &mut temporary)?;
            for (slot, b) in gpu.program.sources.iter().zip(&sources) {
                if let Some(v) = find(&ask, slot.kind, &slot.name) {
                    inputs.push(Moved { link: i, name: slot.name.clone(), ty: v.ty.clone(), at: 0, place: (*b, 0) });
                }
            }
            let bound = self.bound(l.program, l.dims, &sources, &mut temporary)?;
            let mut kept = vec![];
            for (o, (ty, place)) in gpu.program.outputs.iter().filter(|o| !o.update).zip(&bound.outputs) {
                if let Some((_, value)) = l.keep.iter().find(|(output, _)| *output == o.name) {
                    kept.push((*place, self.room(value, ty)?, ty.bytes()));
                }
                if l.wants(&o.name) {
                    results.push(Moved { link: i, name: o.name.clone(), ty: ty.clone(), at: 0, place: *place });
                }
            }
            all.push(BoundLink { gpu, bound, sources, kept });
        }
        // Results first, so that they are read in one piece.
        let mut at = 0usize;
        let mut place = |m: &mut Moved| {
            m.at = at;
            at += m.ty.bytes().next_multiple_of(64);
        };
        results.iter_mut().for_each(&mut place);
        let end = results.last().map_or(0, |m| m.at + m.ty.bytes());
        inputs.iter_mut().for_each(&mut place);
        Ok(Chain {
            key: links.iter().map(Key::of).collect(),
            layout,
            gone,
            used: self.tick,
            links: all,
            inputs,
            results,
            host: HostId(usize::MAX),
            bytes: at,
            record: Record::First,
            read: vec![0; end],
        })
    }

    /// Gives back what a chain holds.
    pub(super) fn drop_chain(&mut self, c: Chain) -> Outcome<()> {
        let name = &c.links[0].gpu.program.name;
        // It may be under way.
        let ended = self.device.synchronise();
        let forgotten = match c.record {
            Record::Made(r) => self.device.forget(r),
            _ => Ok(()),
        };
        ended.and(forgotten).and(self.device.free_host(c.host)).map_err(device(name, "a record of its steps"))
    }
}

/// Whether the inputs are those that the chain has places for.
fn fits(c: &Chain, links: &[Link]) -> bool {
    let given: usize = links.iter().map(|l| l.inputs.len()).sum();
    let has = |m: &Moved| links[m.link].inputs.iter().any(|(n, b)| *n == m.name && b.ty == m.ty);
    given == c.inputs.len() && c.inputs.iter().all(has)
}

/// The error of a chain whose links were started one by one: of the link whose work had not come to its end.
fn blame(c: &Chain, e: Error) -> GpuError {
    let Error::Lost { finished: Some(finished), .. } = &e else { return whole(c, e) };
    let mut finished = *finished;
    for l in &c.links {
        if let Some(w) = l.bound.work.get(finished) {
            return device(&l.gpu.program.name, w.describe(&l.gpu))(e);
        }
        finished -= l.bound.work.len();
    }
    device(&c.links[c.links.len() - 1].gpu.program.name, "its end")(e)
}

/// The error of a chain of which no more is known.
fn whole(c: &Chain, e: Error) -> GpuError {
    let names: Vec<&str> = c.links.iter().map(|l| l.gpu.program.name.as_str()).collect();
    let links: Vec<String> = c.links.iter().map(|l| span(&l.gpu, &l.bound.work)).collect();
    device(&names.join(", then "), links.join("; or "))(e)
}
