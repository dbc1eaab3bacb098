//! A memory in pages in place of arrays: what a program that is given one reads on a GPU.
//!
//! ```text
//! input k, v      f32[N, C·S, h, d]   →   state k: [kv_slots, S, h, d]               S: the chunk of the ops that attend
//!                                         state chunk_table: i32[N, C]               the slot of every chunk
//! input landmarks f32[N, C, h, r]     →   state landmarks: [landmark_pages, 128, h, r]
//!                                         state landmark_table: i32[N, C / 128]      the page of every 128 chunks
//!                                         state landmark_window: i32[N, 2]           its pages that are there, from, to
//! ```
//! The steps that read such a source get its tables as more operands, behind those that their op has.  Pools and tables are
//! states: they stay on the device, and whoever owns them fills them between runs.  A pool's elements may be narrower than what
//! the graph says.
//!
//! Where not all landmarks fit the device ([`LANDMARKS_AWAY`] is 1), the first call of a step that chooses among them is started
//! once per part of them, each behind the writes of its pages, table and window; what it found stays in its workspace.

use crate::program::{Buffer, BufferId, BufferKind, Program, SourceSlot, View};
use rambac_ir::ops::{Op, SourceKind};
use rambac_ir::{DType, Dim, Sym, Ty};

/// Landmarks of a page; as `pages.cuh` has it.
pub const LANDMARK_PAGE: usize = 128;
/// Symbol of the number of slots for keys and values.
pub const KV_SLOTS: &str = "kv_slots";
/// Symbol of the number of pages of landmarks.
pub const LANDMARK_PAGES: &str = "landmark_pages";
/// State that says where every chunk's keys and values are.
pub const CHUNK_TABLE: &str = "chunk_table";
/// State that says where every page of landmarks is.
pub const LANDMARK_TABLE: &str = "landmark_table";
/// State that says which pages of landmarks are there.
pub const LANDMARK_WINDOW: &str = "landmark_window";
/// Symbol: 1 where only a part of the landmarks is there at a time, else 0.
pub const LANDMARKS_AWAY: &str = "landmarks_away";

/// Why a source can't be pages.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PagesError {
    #[error("{program} has no input \"{name}\" that could be pages")]
    NoInput { program: String, name: String },
    #[error("{program}: step {step} ({op}) reads \"{name}\" and takes no pages")]
    Reader { program: String, name: String, step: usize, op: &'static str },
    #[error("{program}: \"{name}\" is {ty}, which is no whole number of {unit}")]
    Shape { program: String, name: String, ty: String, unit: String },
}

/// What a step reads a paged source as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Chunk(usize),
    Landmarks,
}

/// The operand that a step reads as pages, if it takes them there.
fn unit(op: &Op, operand: usize) -> Option<Unit> {
    match (op, operand) {
        (Op::ChunkAttention(a), 1 | 2) => Some(Unit::Chunk(a.chunk)),
        (Op::Selection(_), 1) => Some(Unit::Landmarks),
        _ => None,
    }
}

/// The program with the inputs `names` as pools of `stored` elements and tables.
///
/// # Errors
/// There is no such input, or something reads it that takes no pages.
pub fn paged(mut p: Program, names: &[&str], stored: DType) -> Result<Program, PagesError> {
    for name in names {
        let program = p.name.clone();
        let named = |s: &SourceSlot| s.name == *name && s.kind == SourceKind::Input;
        let no_input = || PagesError::NoInput { program: program.clone(), name: name.to_string() };
        let source = p.sources.iter().position(named).ok_or_else(no_input)?;
        let (buffer, ty) = (p.sources[source].buffer, p.sources[source].ty.clone());
        let mut readers = vec![];
        for (step, s) in p.steps.iter().enumerate() {
            for (i, _) in s.inputs.iter().enumerate().filter(|(_, v)| v.buffer == buffer) {
                let whole = s.inputs[i].strided.is_none() && s.inputs[i].offset == Dim::int(0);
                match unit(&s.op, i).filter(|_| whole && s.inputs[i].ty == ty) {
                    Some(u) => readers.push((step, i, u)),
                    None => {
                        let op = s.op.mnemonic();
                        return Err(PagesError::Reader { program, name: name.to_string(), step, op });
                    }
                }
            }
        }
        // What nobody reads needs no pages.
        let Some(&(_, _, unit)) = readers.first() else { continue };
        let (symbol, table, rows, chunks) = match unit {
            Unit::Chunk(s) => (KV_SLOTS, CHUNK_TABLE, s, ty.shape[1].checked_div(s as u64)),
            Unit::Landmarks => {
                let pages = ty.shape[1].checked_div(LANDMARK_PAGE as u64);
                (LANDMARK_PAGES, LANDMARK_TABLE, LANDMARK_PAGE, pages)
            }
        };
        let Some(entries) = chunks.filter(|_| readers.iter().all(|r| r.2 == unit)) else {
            let unit = format!("{rows} rows");
            return Err(PagesError::Shape { program, name: name.to_string(), ty: ty.to_string(), unit });
        };
        let also = if unit == Unit::Landmarks { Some(LANDMARKS_AWAY) } else { None };
        for symbol in also.into_iter().chain([symbol]) {
            if !p.syms.iter().any(|s| s.as_str() == symbol) {
                p.syms.push(Sym::new(symbol));
            }
        }
        let pool = Ty::new(stored, [Dim::sym(symbol), Dim::int(rows), ty.shape[2].clone(), ty.shape[3].clone()]);
        p.buffers[buffer.index()].ty = pool.clone();
        p.sources[source].ty = pool.clone();
        p.sources[source].kind = SourceKind::State;
        let mut tables = vec![table_source(&mut p, table, Ty::i32([ty.shape[0].clone(), entries]))];
        if unit == Unit::Landmarks {
            tables.push(table_source(&mut p, LANDMARK_WINDOW, Ty::i32([ty.shape[0].clone(), Dim::int(2)])));
        }
        for (step, i, _) in readers {
            let inputs = &mut p.steps[step].inputs;
            inputs[i].ty = pool.clone();
            for table in &tables {
                if !inputs.contains(table) {
                    inputs.push(table.clone());
                }
            }
        }
    }
    Ok(p)
}

/// The table's source, made if it is not there.
fn table_source(p: &mut Program, name: &str, ty: Ty) -> View {
    let view = |buffer, ty| View { buffer, offset: Dim::int(0), ty, strided: None };
    if let Some(s) = p.source(name) {
        return view(s.buffer, ty);
    }
    let buffer = BufferId(p.buffers.len() as u32);
    p.buffers.push(Buffer { ty: ty.clone(), kind: BufferKind::Source(p.sources.len()) });
    p.sources.push(SourceSlot { kind: SourceKind::State, name: name.into(), ty: ty.clone(), buffer });
    view(buffer, ty)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lower;
    use rambac_ir::Builder;
    use rambac_ir::ops::*;

    fn program(also: bool) -> Program {
        let mut b = Builder::new("attending", &["N", "L", "C"]);
        let [n, l] = [Dim::sym("N"), Dim::sym("L")];
        let tokens = Dim::sym("C").checked_mul(&Dim::int(16)).unwrap();
        let f32 = |rows: &Dim, cols: [usize; 2]| Ty::f32([n.clone(), rows.clone(), cols[0].into(), cols[1].into()]);
        let q = b.input("q", f32(&l, [2, 32]));
        let (k, v) = (b.input("k", f32(&tokens, [1, 32])), b.input("v", f32(&tokens, [1, 32])));
        let landmarks = b.input("landmarks", f32(&Dim::sym("C"), [1, 8]));
        let rq = b.input("rq", f32(&l, [1, 8]));
        let start = b.input("start", Ty::i32([n.clone()]));
        let op = Selection { chunk: 16, scale: 1.0, k: 4, order: Order::Recent, rule: Weighting::One };
        let s = b.push_all(op, &[rq, landmarks, start]);
        let op = ChunkAttention { chunk: 16, scale: 1.0, off_by_one: 0.0 };
        let y = b.push(op, &[q, k, v, s[0], s[1], s[2]]);
        b.output("y", y);
        if also {
            let sum = b.sum_all(k);
            b.output("sum", sum);
        }
        lower(&b.finish().unwrap())
    }

    #[test]
    fn sources_become_pools_with_tables() {
        let p = paged(program(false), &["k", "v", "landmarks"], DType::BF16).unwrap();
        let ty = |name: &str| p.source(name).unwrap().ty.to_string();
        assert_eq!(ty("k"), "bf16[kv_slots, 16, 1, 32]");
        assert_eq!(ty("landmarks"), "bf16[landmark_pages, 128, 1, 8]");
        assert_eq!((ty("chunk_table"), ty("landmark_table")), ("i32[N, C]".into(), "i32[N, C/128]".into()));
        let operands: Vec<usize> = p.steps.iter().map(|s| s.inputs.len()).collect();
        assert_eq!(operands, [5, 7], "one table each, for k and v together, and the landmarks' window");
    }

    #[test]
    fn other_readers_are_refused() {
        let e = paged(program(true), &["k"], DType::F32).unwrap_err();
        assert!(e.to_string().contains("(reduce) reads \"k\" and takes no pages"), "{e}");
        assert!(paged(program(false), &["x"], DType::F32).is_err());
    }
}
