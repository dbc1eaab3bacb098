//! What the lanes of a warp know: one past for all of them, until some learn what others don't.

use super::warp::Warp;
use crate::check::past::{Known, Past};

/// Pasts with the lanes that have them.
pub(crate) struct Views {
    all: Vec<(u32, Past)>,
    /// Of each lane.
    at: [u8; 32],
}

impl Views {
    pub fn new(n_warps: usize) -> Views {
        Views { all: vec![(u32::MAX, Past::new(n_warps))], at: [0; 32] }
    }

    pub fn clear(&mut self) {
        self.all.truncate(1);
        self.all[0].0 = u32::MAX;
        self.all[0].1.clear();
        self.at = [0; 32];
    }

    #[inline(always)]
    pub fn of(&self, lane: u32) -> &Past {
        &self.all[self.at[lane as usize] as usize].1
    }

    /// What some lanes know together.
    fn joined(&self, mask: u32, into: &mut Past) {
        self.all.iter().filter(|v| v.0 & mask != 0).for_each(|v| into.join(&v.1));
    }

    /// Lanes learn.
    fn each(&mut self, mask: u32, live: u32, learn: impl Fn(&mut Past)) {
        for i in 0..self.all.len() {
            let has = self.all[i].0;
            if has & mask == 0 {
                continue;
            }
            if has & live & !mask == 0 {
                learn(&mut self.all[i].1);
                continue;
            }
            let mut past = self.all[i].1.clone();
            learn(&mut past);
            self.all[i].0 &= !mask;
            self.all.push((has & mask, past));
        }
        self.count();
    }

    /// Lanes know this and nothing else.
    fn set(&mut self, mask: u32, live: u32, past: Past) {
        if live & !mask == 0 {
            self.all.truncate(1);
            self.all[0] = (u32::MAX, past);
            self.at = [0; 32];
            return;
        }
        self.all.iter_mut().for_each(|v| v.0 &= !mask);
        self.all.retain(|v| v.0 != 0);
        self.all.push((mask, past));
        self.count();
    }

    fn count(&mut self) {
        for (i, v) in self.all.iter().enumerate() {
            super::lanes(v.0).for_each(|l| self.at[l] = i as u8);
        }
    }
}

impl Warp {
    /// Lanes hand on what they know and did; `clock` has advanced.
    pub fn hand_on(&self, mask: u32, into: &mut Past) {
        self.views.joined(mask, into);
        into.add(self.index, mask, self.live, self.clock);
    }

    /// Lanes learn what others handed on.
    pub fn learn(&mut self, mask: u32, from: &Past) {
        self.views.each(mask, self.live, |p| p.join(from));
    }

    /// Lanes learn what was released by threads of any cluster.
    pub fn learn_known(&mut self, mask: u32, own: u32, known: &Known) {
        self.views.each(mask, self.live, |p| p.join_known(own, known));
    }

    /// Lanes that came to a barrier go on: all of them know what was handed on there, by themselves too.
    pub fn pass(&mut self, mask: u32, done: &Past) {
        if self.views.all.len() == 1 && self.live & !mask == 0 {
            self.views.all[0].1.join(done);
        } else {
            self.views.set(mask, self.live, done.clone());
        }
    }

    /// Lanes meet at a `bar.warp.sync`.
    pub fn meet(&mut self, mask: u32) {
        self.clock += 1;
        if self.views.all.len() == 1 && self.live & !mask == 0 {
            self.views.all[0].1.add(self.index, mask, self.live, self.clock);
            return;
        }
        let mut past = Past::default();
        self.hand_on(mask, &mut past);
        self.views.set(mask, self.live, past);
    }
}
