//! What is wrong with an access, in words.

use super::memory::{Spot, window_of};
use super::warp::Warp;
use super::{Env, Site};
use crate::check::Kind;
use crate::check::global::Clash as GlobalClash;
use crate::check::shared::Clash;
use crate::memory::{address_of, locate};
use crate::parse::ast::Space;

impl Warp {
    pub fn global_trouble(&self, address: u64, size: usize, store: bool, env: &Env) -> (Kind, String) {
        let what = if store { "a store" } else { "a load" };
        let (unit, at) = locate(address);
        let window = window_of(address);
        if window != Space::Global {
            let text = format!("{what} of {size} bytes in global memory at an address of {window:?} memory");
            return (Kind::OutOfBounds, text);
        }
        let Some(b) = env.memory.buffers.get(unit) else {
            return (Kind::OutOfBounds, format!("{what} of {size} bytes where no buffer is"));
        };
        if at < 0 || at as usize + size > b.bytes {
            let place = if at < 0 {
                format!("{} bytes before its begin", -at)
            } else if at as usize >= b.bytes {
                format!("{} bytes past its end", at as usize - b.bytes)
            } else {
                "across its end".into()
            };
            return (
                Kind::OutOfBounds,
                format!("{what} of {size} bytes of buffer \"{}\" ({} bytes), {place}", b.name, b.bytes),
            );
        }
        if !(at as usize).is_multiple_of(size) {
            return (Kind::Misaligned, format!("{what} of {size} bytes of buffer \"{}\" at byte {at}", b.name));
        }
        (Kind::ReadOnlyWrite, format!("{what} to byte {at} of buffer \"{}\", which is an input", b.name))
    }

    /// Notes a clash in global memory.
    pub fn global_clash(&self, clash: GlobalClash, spot: Spot, store: bool, lane: usize, site: &mut Site) {
        let address = Some(address_of(spot.unit) + spot.at as u64);
        let name = &site.env.memory.buffers[spot.unit].name;
        let place = format!("byte {} of buffer \"{name}\"", spot.at);
        let what = if store { "write" } else { "read" };
        let other = |cluster: u32, thread: u32| {
            let warp = thread / 32;
            let block = cluster * site.blocks.len() as u32 + warp / site.common.warps_per_block;
            let thread = warp % site.common.warps_per_block * 32 + thread % 32;
            format!("thread {thread} of block {block}")
        };
        let (kind, at, text) = match clash {
            GlobalClash::Uninitialised => (Kind::Uninitialised, None, format!("{place} was never written")),
            GlobalClash::Write { cluster, thread, pc } => {
                let text = format!("{what} of {place}, written by {} with nothing between", other(cluster, thread));
                (Kind::GlobalRace, pc, text)
            }
            GlobalClash::Read { cluster, thread } => {
                let text = format!("{what} of {place}, read by {} with nothing between", other(cluster, thread));
                (Kind::GlobalRace, None, text)
            }
        };
        self.find_two(site, kind, at, lane as u32, address, || text);
    }

    /// Notes a clash in shared memory.
    pub fn shared_clash(&self, clash: Clash, spot: Spot, store: bool, lane: usize, site: &mut Site) {
        let place = shared_name(site.env, spot.at);
        let what = if store { "write" } else { "read" };
        let per = site.env.block.iter().product::<u32>().div_ceil(32);
        let other = |t: u32| {
            let (warp, lane) = (t / 32 % per, t % 32);
            format!("thread {}", warp * 32 + lane)
        };
        let (kind, at, text) = match clash {
            Clash::Uninitialised => (Kind::Uninitialised, None, format!("{place} was never written")),
            Clash::Write { thread, pc } => {
                let text = format!("{what} of {place}, written by {} with no barrier between", other(thread));
                (Kind::SharedRace, Some(pc), text)
            }
            Clash::Read { thread, pc } => {
                let text = format!("{what} of {place}, read by {} with no barrier between", other(thread));
                (Kind::SharedRace, Some(pc), text)
            }
            Clash::Pending { thread, pc } => {
                let text = format!("{what} of {place}, which an asynchronous copy of {} still fills", other(thread));
                (Kind::AsyncUnwaited, Some(pc), text)
            }
            Clash::Proxy { thread, pc } => {
                let text = format!(
                    "{place} was written by {}; the asynchronous engine sees that only after fence.proxy.async",
                    other(thread)
                );
                (Kind::ProxyFence, Some(pc), text)
            }
            Clash::Product { thread, pc } => {
                let text = format!("{what} of {place}, which a product of {} still reads", other(thread));
                (Kind::AsyncUnwaited, Some(pc), text)
            }
        };
        self.find_two(site, kind, at, lane as u32, Some(spot.at as u64), || text);
    }
}

/// Whether local bytes lie within one variable, or where none is declared (parameters of calls).
pub(crate) fn in_variable(env: &Env, at: usize, size: usize) -> bool {
    env.program.local_vars.iter().all(|(_, from, n)| {
        let (from, to) = (*from as usize, (*from + *n) as usize);
        at + size <= from || at >= to || (at >= from && at + size <= to)
    })
}

/// `as+12` for a place in shared memory.
pub(crate) fn shared_name(env: &Env, at: usize) -> String {
    for (name, from, n) in &env.program.shared_vars {
        let from = *from as usize;
        if (from..from + *n as usize).contains(&at) {
            return format!("shared {name}+{}", at - from);
        }
    }
    match at.checked_sub(env.program.shared_bytes as usize) {
        Some(d) if env.dynamic_shared > 0 => format!("byte {d} of dynamic shared memory"),
        _ => format!("shared byte {at}"),
    }
}

pub(crate) fn local_name(env: &Env, at: usize) -> String {
    for (name, from, n) in &env.program.local_vars {
        let from = *from as usize;
        if (from..from + *n as usize).contains(&at) {
            return format!("local {name}+{}", at - from);
        }
    }
    format!("local byte {at}")
}
