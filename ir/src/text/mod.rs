//! The text form of a graph: `parse(print(g)) == g`.
//!
//! ```text
//! graph hsa(N, L) {                                   # the symbols that dims may use
//!   %q = input "q" : f32[N, L, 16, 64]                # input, param, state: a name and a type
//!   %c = constant 0.5 : f32[N, L]
//!   %i, %n = select %s {k = 8, order = recent} : i32[N, L, 1, 8], i32[N, L, 1]
//!   %7 = matmul %a, %b {trans_b = true} : f32[N, L, 4] @layers.3.mixer
//!   return "y" = %y, "loss" = %7
//! }
//! ```
//! - One statement per line; `#` and `//` begin comments; spaces don't matter.
//! - `: types` may be left out where the op infers them (all but input, param, state, constant, iota); where it is
//!   written it must be what the op infers.
//! - `@scope` is the node's scope; one with other characters than letters, digits, `_`, `.`, `-` is quoted: `@"a b"`.
//! - `%7` and `%7_1` (digits only) are labels of nameless values.  Any other label names the value for people; odd
//!   characters are quoted: `%"a b"`.  Labels are unique; values that share a name are told apart by a number that is
//!   not part of it: `%x`, `%x~2`, `%x~3`.
//! - Attributes with a default may be left out.  Values: `8`, `-1`, `1e-5`, `inf`, `true`, `recent`, `"text"`, `[1, 2]`,
//!   `4*L*N/64`, `f32[N, L]`.  Strings know the escapes `\" \\ \n \r \t \u{1f600}`.
//! - `const chunk = 16, scale = 1/sqrt(chunk)` gives numbers names, which stand for them wherever a number may stand, in
//!   dims (`L/chunk`) and attributes.  [`parse_with`] sets others, so that one text serves all sizes; the printer writes values.
//! - `return %y` names the output `y`; `return "loss" = %y` names it `loss`; `return` alone gives none.
//!
//! Parsing checks syntax, names and types and reports every broken line; what else must hold of a graph is
//! [`verify`](crate::verify)'s.  No input makes it panic.  Graphs that [`verify`](crate::verify) accepts survive the
//! way out and back, but for NaN constants, which are unequal to themselves.

mod consts;
mod lexer;
mod parser;
mod printer;

pub use consts::Consts;
pub(crate) use parser::dims_of;
pub use parser::{parse, parse_with};
pub use printer::print;

/// Ops whose type is not inferred: it comes from the annotation.
const ANNOTATED: [&str; 5] = ["input", "param", "state", "constant", "iota"];

/// Whether a label is of a nameless value: `7` or `7_1`.
fn is_anonymous(label: &str) -> bool {
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    match label.split_once('_') {
        Some((a, b)) => digits(a) && digits(b),
        None => digits(label),
    }
}

/// Whether `c` may stand in an unquoted label.
fn is_label_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '.'
}

/// Whether `c` may stand in an unquoted scope.
fn is_scope_char(c: char) -> bool {
    is_label_char(c) || c == '-'
}

/// Whether `s` can be written as a bare word.
fn is_word(s: &str) -> bool {
    s.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && s.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}
