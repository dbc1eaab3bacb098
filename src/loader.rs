//! Batches that are made ahead of their step, on a thread of its own, while a device runs the steps before.
//!
//! A batch is a function of the recipe and its planned number alone, so which thread makes it, and when, changes nothing.

use crate::error::Result;
use miette::miette;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// What makes batches: of a stage, the one of a planned step.
pub type Make<B> = dyn Fn(usize, u64) -> Result<B> + Send + Sync;

/// See the module's comment.
pub struct Loader<B> {
    make: Arc<Make<B>>,
    thread: Option<Ahead<B>>,
    /// What the thread is making.
    ahead: Option<(usize, u64)>,
}

struct Ahead<B> {
    asked: Sender<(usize, u64)>,
    made: Receiver<Result<B>>,
    handle: JoinHandle<()>,
}

impl<B: Send + 'static> Loader<B> {
    /// Makes batches when they are asked for, or `ahead` of that.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn new(make: Arc<Make<B>>, ahead: bool) -> Result<Loader<B>> {
        let mut thread = None;
        if ahead {
            let (asked, asks) = channel();
            let (makes, made) = channel();
            let make = make.clone();
            let work = move || {
                for (stage, planned) in asks {
                    // Nobody may be there to take it.
                    if makes.send(make(stage, planned)).is_err() {
                        break;
                    }
                }
            };
            let handle = std::thread::Builder::new()
                .name("loader".into())
                .spawn(work)
                .map_err(|e| miette!("there is no thread to make batches on: {e}"))?;
            thread = Some(Ahead { asked, made, handle });
        }
        Ok(Loader { make, thread, ahead: None })
    }

    /// The batch of a step; `next` is made meanwhile.
    ///
    /// # Errors
    /// As what makes it.
    pub fn batch(&mut self, at: (usize, u64), next: Option<(usize, u64)>) -> Result<B> {
        let Some(t) = &self.thread else { return (self.make)(at.0, at.1) };
        let gone = || miette!("BUG: the thread that makes batches has ended");
        let ahead = self.ahead.take();
        let waiting = ahead.map(|_| t.made.recv().map_err(|_| gone())).transpose()?;
        let batch = match waiting {
            Some(made) if ahead == Some(at) => made?,
            // A stage ended early: what was made for the next step of the old one is not wanted.
            _ => (self.make)(at.0, at.1)?,
        };
        if let Some(next) = next {
            t.asked.send(next).map_err(|_| gone())?;
            self.ahead = Some(next);
        }
        Ok(batch)
    }
}

impl<B> Drop for Loader<B> {
    fn drop(&mut self) {
        if let Some(Ahead { asked, made, handle }) = self.thread.take() {
            drop((asked, made));
            // A panic there was told by its message.
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// What a loader was asked to make.
    type Asked = Arc<Mutex<Vec<u64>>>;

    fn counted(ahead: bool) -> (Loader<(usize, u64)>, Asked) {
        let seen = Arc::new(Mutex::new(vec![]));
        let list = seen.clone();
        let make = move |stage, planned| {
            list.lock().unwrap().push(planned);
            if planned == 7 { Err(miette!("no row 7")) } else { Ok((stage, planned)) }
        };
        (Loader::new(Arc::new(make), ahead).unwrap(), seen)
    }

    #[test]
    fn batches_are_those_that_were_asked_for() {
        for ahead in [false, true] {
            let (mut l, seen) = counted(ahead);
            assert_eq!(l.batch((0, 0), Some((0, 1))).unwrap(), (0, 0));
            assert_eq!(l.batch((0, 1), Some((0, 2))).unwrap(), (0, 1));
            // The stage ended early: another one than was foreseen.
            assert_eq!(l.batch((1, 5), Some((1, 6))).unwrap(), (1, 5));
            assert_eq!(l.batch((1, 6), Some((1, 7))).unwrap(), (1, 6));
            assert!(l.batch((1, 7), None).unwrap_err().to_string().contains("no row 7"));
            drop(l);
            let all = seen.lock().unwrap().clone();
            assert_eq!(all, if ahead { vec![0, 1, 2, 5, 6, 7] } else { vec![0, 1, 5, 6, 7] });
        }
    }
}
