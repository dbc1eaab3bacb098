//! Named numbers of a text: `const heads = 4, dim = 16, scale = 1/sqrt(dim)`.
//!
//! A const's name stands for its value wherever a number may stand; expressions know `+ - * /`, `sqrt(…)` and parentheses.

use super::lexer::{Spanned, Tok};

/// Names and values, in the text's order.
pub type Consts = Vec<(String, f64)>;

/// Nested parentheses go no deeper.
const MAX_DEPTH: usize = 32;

fn get(consts: &Consts, name: &str) -> Option<f64> {
    consts.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
}

/// Puts values in the place of names, but not of attributes' and operations' names.
pub(super) fn substitute(toks: &mut [Spanned], consts: &Consts) {
    if consts.is_empty() || toks.first().is_some_and(|(t, _)| matches!(t, Tok::Word(w) if w == "const")) {
        return;
    }
    let mut braces = 0usize;
    for i in 0..toks.len() {
        match &toks[i].0 {
            Tok::Punct('{') => braces += 1,
            Tok::Punct('}') => braces = braces.saturating_sub(1),
            Tok::Word(w) => {
                let names_attribute = toks.get(i + 1).is_some_and(|(t, _)| *t == Tok::Punct('='));
                let names_op = i == 0 || braces == 0 && toks[i - 1].0 == Tok::Punct('=');
                let Some(v) = get(consts, w).filter(|_| !names_attribute && !names_op) else { continue };
                let whole = v >= 0.0 && v.fract() == 0.0 && v <= (1u64 << 53) as f64;
                toks[i].0 = if whole { Tok::Int(v as u64) } else { Tok::Float(v) };
            }
            _ => {}
        }
    }
}

/// The value of an expression, which ends at a comma or the line's end.
pub(super) fn value(toks: &mut &[Spanned], consts: &Consts) -> Result<f64, String> {
    let v = sum(toks, consts, 0)?;
    if v.is_finite() { Ok(v) } else { Err(format!("this const is {v}: a finite number is wanted")) }
}

fn eat(toks: &mut &[Spanned], c: char) -> bool {
    let hit = toks.first().is_some_and(|(t, _)| *t == Tok::Punct(c));
    if hit {
        *toks = &toks[1..];
    }
    hit
}

fn sum(toks: &mut &[Spanned], consts: &Consts, depth: usize) -> Result<f64, String> {
    let mut v = product(toks, consts, depth)?;
    loop {
        if eat(toks, '+') {
            v += product(toks, consts, depth)?;
        } else if eat(toks, '-') {
            v -= product(toks, consts, depth)?;
        } else {
            return Ok(v);
        }
    }
}

fn product(toks: &mut &[Spanned], consts: &Consts, depth: usize) -> Result<f64, String> {
    let mut v = factor(toks, consts, depth)?;
    loop {
        if eat(toks, '*') {
            v *= factor(toks, consts, depth)?;
        } else if eat(toks, '/') {
            v /= factor(toks, consts, depth)?;
        } else {
            return Ok(v);
        }
    }
}

fn factor(toks: &mut &[Spanned], consts: &Consts, depth: usize) -> Result<f64, String> {
    if depth == MAX_DEPTH {
        return Err("parentheses nest too deep".into());
    }
    if eat(toks, '-') {
        return Ok(-factor(toks, consts, depth + 1)?);
    }
    if eat(toks, '(') {
        let v = sum(toks, consts, depth + 1)?;
        return if eat(toks, ')') { Ok(v) } else { Err("a closing `)` is missing".into()) };
    }
    let Some((tok, _)) = toks.first() else { return Err("a number is missing".into()) };
    *toks = &toks[1..];
    match tok {
        Tok::Int(v) => Ok(*v as f64),
        Tok::Float(v) => Ok(*v),
        Tok::Word(w) if w == "sqrt" => {
            let inner = toks.first().is_some_and(|(t, _)| *t == Tok::Punct('('));
            if inner { Ok(factor(toks, consts, depth + 1)?.sqrt()) } else { Err("write sqrt(…)".into()) }
        }
        Tok::Word(w) => {
            get(consts, w).ok_or_else(|| format!("the const `{w}` has no value yet; give it one before this"))
        }
        other => Err(format!("a number or a const's name is wanted, not {}", other.describe())),
    }
}
