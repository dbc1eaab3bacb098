//! A PTX module as it is written: names are text, nothing is resolved.

use crate::isa::Ty;

/// Where a variable lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    Global,
    Shared,
    Const,
    Local,
    Param,
    /// Any of them: the address tells.
    Generic,
}

#[derive(Clone, Debug)]
pub struct Module {
    /// PTX ISA, e.g. (8, 8).
    pub version: (u32, u32),
    /// `sm_80`, `sm_90a`.
    pub target: String,
    pub vars: Vec<Var>,
    pub functions: Vec<Function>,
    /// Source files by the number that `.loc` uses.
    pub files: Vec<(u32, String)>,
}

/// A variable of any space, parameters included.
#[derive(Clone, Debug)]
pub struct Var {
    pub space: Space,
    pub name: String,
    pub align: u64,
    /// Of one element.
    pub ty: Ty,
    /// 0 where the launch decides: `.extern .shared .b8 s[]`.
    pub bytes: u64,
    /// Initial bytes; shorter than `bytes` where the rest is zero.
    pub init: Vec<u8>,
    /// Addresses of other variables within `init`: (offset, name, added, in generic space).
    pub addresses: Vec<(u64, String, i64, bool)>,
    pub line: u32,
}

#[derive(Clone, Debug)]
pub struct Function {
    pub name: String,
    pub entry: bool,
    pub returns: Vec<Var>,
    pub params: Vec<Var>,
    /// Empty for a declaration.
    pub body: Vec<Stmt>,
    pub has_body: bool,
    /// `.reqntid`, `.maxntid`: threads a block must or may have.
    pub required_block: Option<[u32; 3]>,
    pub max_threads: Option<u32>,
    /// `.reqnctapercluster`.
    pub cluster: Option<[u32; 3]>,
    pub line: u32,
}

#[derive(Clone, Debug)]
pub enum Stmt {
    Label(String, u32),
    Inst(Inst),
    /// `.reg .f32 %f<3>` is three names' worth: (`%f`, 3); a plain name has count 0.
    Reg {
        ty: Ty,
        names: Vec<(String, u32)>,
    },
    Var(Var),
    /// `.branchtargets` of the label in front of it.
    Targets(Vec<String>),
    Loc(Source),
    Open,
    Close,
}

/// A line of the source that PTX was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    pub file: u32,
    pub line: u32,
    pub column: u32,
    /// Where the function that holds this line was inlined.
    pub inlined_at: Option<(u32, u32)>,
}

#[derive(Clone, Debug)]
pub struct Inst {
    /// Name and whether it is negated.
    pub guard: Option<(String, bool)>,
    /// `ld`, then `global`, `v4`, `f32`.
    pub parts: Vec<String>,
    pub operands: Vec<Operand>,
    pub line: u32,
}

impl Inst {
    pub fn name(&self) -> String {
        self.parts.join(".")
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    Name(String),
    /// `!%p1`
    Not(String),
    /// `-%r1` occurs in nothing we know; a negative constant is `Int`.
    Int(i64),
    F32(u32),
    F64(u64),
    /// `name+4`
    Offset(String, i64),
    /// `[base + offset]`, then coordinates or further operands within the brackets.
    Address {
        base: Option<String>,
        offset: i64,
        inner: Vec<Operand>,
    },
    /// `{a, b}` and the `(a, b)` of a call.
    List(Vec<Operand>),
    /// `%r1|%p1`
    Pair(Box<Operand>, Box<Operand>),
}
