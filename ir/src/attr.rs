//! Attributes of ops: the values between `{` and `}` in the text form, and the macro that declares an op's struct.

use crate::dim::Dim;
use crate::ty::{DType, Ty};
use std::fmt;

/// An attribute as the text form sees it.
#[derive(Clone, Debug, PartialEq)]
pub enum Attr {
    Int(i64),
    Float(f64),
    Bool(bool),
    /// A bare word: an enum's case.
    Word(String),
    Str(String),
    Dim(Dim),
    Ty(Ty),
    List(Vec<Attr>),
}

impl fmt::Display for Attr {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Attr::Int(v) => write!(f, "{v}"),
            Attr::Float(v) => write!(f, "{v:?}"),
            Attr::Bool(v) => write!(f, "{v}"),
            Attr::Word(w) => f.write_str(w),
            Attr::Str(s) => write!(f, "{}", quoted(s)),
            Attr::Dim(d) => write!(f, "{d}"),
            Attr::Ty(t) => write!(f, "{t}"),
            Attr::List(v) => {
                let parts: Vec<String> = v.iter().map(|a| a.to_string()).collect();
                write!(f, "[{}]", parts.join(", "))
            }
        }
    }
}

/// `s` in double quotes, with quotes, backslashes and control characters escaped.
pub fn quoted(s: &str) -> String {
    let mut out = String::from("\"");
    for c in s.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out += "\\n",
            '\r' => out += "\\r",
            '\t' => out += "\\t",
            c if c.is_control() => out += &format!("\\u{{{:x}}}", c as u32),
            c => out.push(c),
        }
    }
    out + "\""
}

/// What is wrong with an op's attributes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttrError {
    #[error("missing attribute `{name}`")]
    Missing { name: &'static str },
    #[error("attribute `{name}`: expected {expected}, found {found}")]
    Wrong { name: &'static str, expected: String, found: String },
    #[error("unknown attribute `{name}`; this op has: {known}")]
    Unknown { name: String, known: String },
}

/// A Rust type that an attribute can have.
pub trait AttrValue: Sized + Clone + PartialEq {
    /// What a user should have written, e.g. `an integer`.
    fn expected() -> String;
    fn to_attr(&self) -> Attr;
    fn from_attr(a: &Attr) -> Option<Self>;
}

impl AttrValue for usize {
    fn expected() -> String {
        "a non-negative integer".into()
    }
    fn to_attr(&self) -> Attr {
        Dim::int(*self).to_attr()
    }
    fn from_attr(a: &Attr) -> Option<Self> {
        match a {
            Attr::Int(v) => usize::try_from(*v).ok(),
            // Beyond `i64`.
            Attr::Dim(d) => d.as_int(),
            _ => None,
        }
    }
}
impl AttrValue for i64 {
    fn expected() -> String {
        "an integer".into()
    }
    fn to_attr(&self) -> Attr {
        Attr::Int(*self)
    }
    fn from_attr(a: &Attr) -> Option<Self> {
        if let Attr::Int(v) = a { Some(*v) } else { None }
    }
}
impl AttrValue for f64 {
    fn expected() -> String {
        "a number".into()
    }
    fn to_attr(&self) -> Attr {
        Attr::Float(*self)
    }
    fn from_attr(a: &Attr) -> Option<Self> {
        match a {
            Attr::Float(v) => Some(*v),
            Attr::Int(v) => Some(*v as f64),
            _ => None,
        }
    }
}
impl AttrValue for bool {
    fn expected() -> String {
        "true or false".into()
    }
    fn to_attr(&self) -> Attr {
        Attr::Bool(*self)
    }
    fn from_attr(a: &Attr) -> Option<Self> {
        if let Attr::Bool(v) = a { Some(*v) } else { None }
    }
}
impl AttrValue for Dim {
    fn expected() -> String {
        "a dim such as 64, L or N*L/64".into()
    }
    fn to_attr(&self) -> Attr {
        match self.as_int().and_then(|v| i64::try_from(v).ok()) {
            Some(v) => Attr::Int(v),
            None => Attr::Dim(self.clone()),
        }
    }
    fn from_attr(a: &Attr) -> Option<Self> {
        match a {
            Attr::Int(v) => usize::try_from(*v).ok().map(Dim::int),
            Attr::Dim(d) => Some(d.clone()),
            // A lone symbol reads as a word.
            Attr::Word(w) if w.chars().next().is_some_and(|c| c.is_ascii_uppercase()) => Some(Dim::sym(w)),
            _ => None,
        }
    }
}
impl AttrValue for Ty {
    fn expected() -> String {
        "a type such as f32[N, L]".into()
    }
    fn to_attr(&self) -> Attr {
        Attr::Ty(self.clone())
    }
    fn from_attr(a: &Attr) -> Option<Self> {
        if let Attr::Ty(t) = a { Some(t.clone()) } else { None }
    }
}
impl AttrValue for DType {
    fn expected() -> String {
        "an element type: f32, bf16, f16, i32 or bool".into()
    }
    fn to_attr(&self) -> Attr {
        Attr::Word(self.name().into())
    }
    fn from_attr(a: &Attr) -> Option<Self> {
        if let Attr::Word(w) = a { DType::from_name(w) } else { None }
    }
}
impl AttrValue for String {
    fn expected() -> String {
        "a string in double quotes".into()
    }
    fn to_attr(&self) -> Attr {
        Attr::Str(self.clone())
    }
    fn from_attr(a: &Attr) -> Option<Self> {
        if let Attr::Str(s) = a { Some(s.clone()) } else { None }
    }
}
impl<T: AttrValue> AttrValue for Vec<T> {
    fn expected() -> String {
        format!("a list in brackets, each {}", T::expected())
    }
    fn to_attr(&self) -> Attr {
        Attr::List(self.iter().map(T::to_attr).collect())
    }
    fn from_attr(a: &Attr) -> Option<Self> {
        if let Attr::List(v) = a { v.iter().map(T::from_attr).collect() } else { None }
    }
}

/// Takes attributes one by one; what is left at the end is unknown.
pub struct AttrReader {
    attrs: Vec<(String, Attr)>,
    asked: Vec<&'static str>,
}

impl AttrReader {
    pub fn new(attrs: Vec<(String, Attr)>) -> Self {
        Self { attrs, asked: vec![] }
    }

    pub fn optional<T: AttrValue>(&mut self, name: &'static str) -> Result<Option<T>, AttrError> {
        self.asked.push(name);
        let Some(at) = self.attrs.iter().position(|(n, _)| n == name) else { return Ok(None) };
        let (_, a) = self.attrs.remove(at);
        T::from_attr(&a).map(Some).ok_or_else(|| AttrError::Wrong {
            name,
            expected: T::expected(),
            found: a.to_string(),
        })
    }

    pub fn required<T: AttrValue>(&mut self, name: &'static str) -> Result<T, AttrError> {
        self.optional(name)?.ok_or(AttrError::Missing { name })
    }

    pub fn finish(self) -> Result<(), AttrError> {
        match self.attrs.into_iter().next() {
            None => Ok(()),
            Some((name, _)) => Err(AttrError::Unknown {
                name,
                known: if self.asked.is_empty() { "none".into() } else { self.asked.join(", ") },
            }),
        }
    }
}

/// Declares an op's struct with its mnemonic and attributes: `op_struct! { /// docs  MatMul = "matmul" { trans_a: bool = false } }`.
/// Attributes with a default are left out of the text where they have it.
#[macro_export]
macro_rules! op_struct {
    ($(#[$m:meta])* $name:ident = $mn:literal { $($(#[$fm:meta])* $field:ident : $t:ty $(= $def:expr)?),* $(,)? }) => {
        $(#[$m])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name { $($(#[$fm])* pub $field: $t),* }

        impl $crate::ops::OpText for $name {
            const MNEMONICS: &'static [&'static str] = &[$mn];
            fn mnemonic(&self) -> &'static str { $mn }
            #[allow(unused_mut, clippy::vec_init_then_push)]
            fn attrs(&self) -> Vec<(&'static str, $crate::attr::Attr)> {
                let mut out = vec![];
                $($crate::op_struct!(@put out, self, $field, $t $(, $def)?);)*
                out
            }
            fn read(_mnemonic: &str, _r: &mut $crate::attr::AttrReader) -> Result<Self, $crate::attr::AttrError> {
                Ok(Self { $($field: $crate::op_struct!(@get _r, $field, $t $(, $def)?)),* })
            }
        }
    };
    (@put $out:ident, $s:ident, $field:ident, $t:ty) => {
        $out.push((stringify!($field), $crate::attr::AttrValue::to_attr(&$s.$field)));
    };
    (@put $out:ident, $s:ident, $field:ident, $t:ty, $def:expr) => {
        let default: $t = $def;
        if $s.$field != default { $crate::op_struct!(@put $out, $s, $field, $t); }
    };
    (@get $r:ident, $field:ident, $t:ty) => { $r.required::<$t>(stringify!($field))? };
    (@get $r:ident, $field:ident, $t:ty, $def:expr) => {
        match $r.optional::<$t>(stringify!($field))? { Some(v) => v, None => $def }
    };
}

/// Declares an enum whose cases are bare words in the text form.
#[macro_export]
macro_rules! word_enum {
    ($(#[$m:meta])* $name:ident { $($(#[$cm:meta])* $case:ident = $word:literal),* $(,)? }) => {
        $(#[$m])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$cm])* $case),* }

        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$case),*];
            pub fn word(self) -> &'static str { match self { $($name::$case => $word),* } }
        }
        impl $crate::attr::AttrValue for $name {
            fn expected() -> String { ["one of:", $($word),*].join(" ") }
            fn to_attr(&self) -> $crate::attr::Attr { $crate::attr::Attr::Word(self.word().into()) }
            fn from_attr(a: &$crate::attr::Attr) -> Option<Self> {
                let $crate::attr::Attr::Word(w) = a else { return None };
                Self::ALL.iter().copied().find(|c| c.word() == w)
            }
        }
    };
}
