//! Which chunks are in a device's slots: a clock (second chance) decides which one goes for another.

use std::collections::HashMap;

/// A chunk of a sequence.
pub(super) type Key = (u32, u32);

/// Where a chunk's keys and values are now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// They are there.
    Here(usize),
    /// They are to be brought there; the chunk that was there is gone.
    Free(usize, Option<Key>),
}

#[derive(Clone, Copy, Default)]
struct Slot {
    owner: Option<Key>,
    /// Used since the hand passed.
    used: bool,
    /// The round that needs it: it stays until that ends.
    round: u64,
}

/// See the module's comment.
#[derive(Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    of: HashMap<Key, usize>,
    hand: usize,
    round: u64,
}

impl Slots {
    pub fn new(slots: usize) -> Slots {
        Slots { slots: vec![Slot::default(); slots], ..Slots::default() }
    }
    pub fn len(&self) -> usize {
        self.slots.len()
    }
    /// Chunks that are in a slot.
    pub fn resident(&self) -> usize {
        self.of.len()
    }
    /// What is taken from now on stays together.
    pub fn begin(&mut self) {
        self.round += 1;
    }
    /// A slot for a chunk; `None` if this round needs them all.
    pub fn take(&mut self, key: Key) -> Option<Place> {
        if let Some(&i) = self.of.get(&key) {
            self.slots[i] = Slot { owner: Some(key), used: true, round: self.round };
            return Some(Place::Here(i));
        }
        // After two turns of the hand nothing is used any more.
        for _ in 0..2 * self.slots.len() {
            let i = self.hand;
            self.hand = (i + 1) % self.slots.len();
            let s = &mut self.slots[i];
            if s.owner.is_some() && s.round == self.round {
                continue;
            }
            if s.owner.is_some() && std::mem::take(&mut s.used) {
                continue;
            }
            let before = s.owner.replace(key);
            *s = Slot { owner: Some(key), used: true, round: self.round };
            if let Some(old) = before {
                self.of.remove(&old);
            }
            self.of.insert(key, i);
            return Some(Place::Free(i, before));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_was_used_again_stays() {
        let mut s = Slots::new(2);
        s.begin();
        assert_eq!(s.take((0, 1)), Some(Place::Free(0, None)));
        assert_eq!(s.take((0, 2)), Some(Place::Free(1, None)));
        // Both were used: the hand passes them once, and takes the first.
        s.begin();
        assert_eq!(s.take((0, 3)), Some(Place::Free(0, Some((0, 1)))));
        // The second has lost its chance, the third is new.
        s.begin();
        assert_eq!(s.take((0, 4)), Some(Place::Free(1, Some((0, 2)))));
        s.begin();
        assert_eq!(s.take((0, 4)), Some(Place::Here(1)));
    }

    #[test]
    fn a_round_keeps_what_it_took() {
        let mut s = Slots::new(2);
        s.begin();
        assert!(s.take((0, 1)).is_some() && s.take((0, 2)).is_some());
        assert_eq!(s.take((0, 3)), None);
        assert_eq!(s.take((0, 1)), Some(Place::Here(0)));
    }

    proptest! {
        /// Every chunk of a round has a slot of its own, and the table of owners is what was said.
        #[test]
        fn slots_hold_what_was_said(
            slots in 1usize..9, rounds in prop::collection::vec(prop::collection::vec(0u32..20, 0..9), 1..40),
        ) {
            let mut s = Slots::new(slots);
            let mut held: Vec<Option<Key>> = vec![None; slots];
            for mut round in rounds {
                round.sort();
                round.dedup();
                round.truncate(slots);
                s.begin();
                for &c in &round {
                    match s.take((0, c)).expect("no more chunks than slots") {
                        Place::Here(i) => prop_assert_eq!(held[i], Some((0, c))),
                        Place::Free(i, before) => {
                            prop_assert_eq!(held[i], before);
                            prop_assert!(!held.contains(&Some((0, c))));
                            held[i] = Some((0, c));
                        }
                    }
                }
                prop_assert!(round.iter().all(|&c| held.contains(&Some((0, c)))));
                prop_assert_eq!(s.resident(), held.iter().flatten().count());
            }
        }
    }
}
