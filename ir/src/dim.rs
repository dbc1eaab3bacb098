//! Symbolic dims: an integer times a product of symbols, divided by an integer.
//!
//! `N`, `L/64`, `4*L`, `N*L/64`.  Kept in lowest terms with sorted symbols, so equal dims are equal values.
//! A denominator is a constraint on the symbols: it must divide the product exactly, checked when symbols are bound.
//! Sums are deliberately absent: state tails and appended rows are operands and results of their ops instead.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// A symbol such as `N` or `L`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sym(Arc<str>);

impl Sym {
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Sym {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Display for Sym {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Values of symbols.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bindings(BTreeMap<Sym, usize>);

impl Bindings {
    pub fn new<'a>(pairs: impl IntoIterator<Item = (&'a str, usize)>) -> Self {
        Self(pairs.into_iter().map(|(s, v)| (Sym::new(s), v)).collect())
    }
    pub fn get(&self, s: &Sym) -> Option<usize> {
        self.0.get(s).copied()
    }
    pub fn set(&mut self, s: Sym, v: usize) {
        self.0.insert(s, v);
    }
    /// Sets symbols by name: those that have a value without taking memory.
    pub fn assign(&mut self, pairs: &[(&str, usize)]) {
        for &(name, v) in pairs {
            match self.0.iter_mut().find(|(s, _)| s.as_str() == name) {
                Some((_, old)) => *old = v,
                None => self.set(Sym::new(name), v),
            }
        }
    }
    pub fn iter(&self) -> impl Iterator<Item = (&Sym, usize)> {
        self.0.iter().map(|(s, v)| (s, *v))
    }
}

impl fmt::Display for Bindings {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|(s, v)| format!("{s}={v}")).collect();
        f.write_str(&parts.join(", "))
    }
}

/// Why a dim has no value under given bindings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DimError {
    #[error("dim {dim}: the symbol {sym} has no value; bind it (known: {known})")]
    Unbound { dim: String, sym: String, known: String },
    #[error("dim {dim}: {value} is not divisible by {den} ({bindings}); choose sizes that are")]
    NotDivisible { dim: String, value: u64, den: u64, bindings: String },
    #[error("dim {dim} overflows at {bindings}")]
    Overflow { dim: String, bindings: String },
}

/// `num * product(syms) / den`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dim {
    num: u64,
    den: u64,
    syms: Vec<Sym>,
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Dim {
    /// An integer dim.
    pub fn int(n: usize) -> Self {
        Self { num: n as u64, den: 1, syms: vec![] }
    }
    /// A symbol.
    pub fn sym(name: &str) -> Self {
        Self { num: 1, den: 1, syms: vec![Sym::new(name)] }
    }

    fn reduced(mut num: u64, mut den: u64, mut syms: Vec<Sym>) -> Self {
        if num == 0 {
            return Self::int(0);
        }
        let g = gcd(num, den);
        num /= g;
        den /= g;
        syms.sort();
        Self { num, den, syms }
    }

    /// The product; `None` on overflow of the integer factor.
    pub fn checked_mul(&self, o: &Dim) -> Option<Dim> {
        // Reduce across first so that intermediate factors stay small.
        let (g1, g2) = (gcd(self.num, o.den).max(1), gcd(o.num, self.den).max(1));
        let num = (self.num / g1).checked_mul(o.num / g2)?;
        let den = (self.den / g2).checked_mul(o.den / g1)?;
        Some(Self::reduced(num, den, self.syms.iter().chain(&o.syms).cloned().collect()))
    }

    /// Divides by a positive integer; `None` on zero or overflow.
    pub fn checked_div(&self, n: u64) -> Option<Dim> {
        if n == 0 {
            return None;
        }
        let g = gcd(self.num, n).max(1);
        Some(Self::reduced(self.num / g, self.den.checked_mul(n / g)?, self.syms.clone()))
    }

    /// `self / o` where the symbols of `o` all cancel and the quotient has this form; `None` otherwise.
    pub fn checked_quotient(&self, o: &Dim) -> Option<Dim> {
        if o.num == 0 {
            return None;
        }
        let mut syms = self.syms.clone();
        for s in &o.syms {
            let at = syms.iter().position(|t| t == s)?;
            syms.remove(at);
        }
        let (g1, g2) = (gcd(self.num, o.num).max(1), gcd(o.den, self.den).max(1));
        let num = (self.num / g1).checked_mul(o.den / g2)?;
        let den = (self.den / g2).checked_mul(o.num / g1)?;
        Some(Self::reduced(num, den, syms))
    }

    /// The value if it holds no symbol and no remainder.
    pub fn as_int(&self) -> Option<usize> {
        (self.syms.is_empty() && self.den == 1).then_some(self.num as usize)
    }
    /// Whether it is a multiple of `n` whatever the symbols' values.
    pub fn is_multiple_of(&self, n: u64) -> bool {
        self.den == 1 && self.num.is_multiple_of(n)
    }
    pub fn is_one(&self) -> bool {
        self.as_int() == Some(1)
    }
    pub fn syms(&self) -> &[Sym] {
        &self.syms
    }
    /// What must divide `num * product(syms)`; 1 where nothing is asked.
    pub fn divisor(&self) -> u64 {
        self.den
    }

    /// The dim with a value in the place of a symbol; `None` on overflow.
    pub fn with(&self, sym: &str, value: usize) -> Option<Dim> {
        let (out, rest): (Vec<Sym>, Vec<Sym>) = self.syms.iter().cloned().partition(|s| s.as_str() == sym);
        let rest = Self::reduced(self.num, self.den, rest);
        out.iter().try_fold(rest, |d, _| d.checked_mul(&Dim::int(value)))
    }
    /// The value under `b`.
    pub fn eval(&self, b: &Bindings) -> Result<usize, DimError> {
        let overflow = || DimError::Overflow { dim: self.to_string(), bindings: b.to_string() };
        let mut v = self.num;
        for s in &self.syms {
            let x = b.get(s).ok_or_else(|| DimError::Unbound {
                dim: self.to_string(),
                sym: s.to_string(),
                known: b.to_string(),
            })?;
            v = v.checked_mul(x as u64).ok_or_else(overflow)?;
        }
        if !v.is_multiple_of(self.den) {
            return Err(DimError::NotDivisible {
                dim: self.to_string(),
                value: v,
                den: self.den,
                bindings: b.to_string(),
            });
        }
        usize::try_from(v / self.den).map_err(|_| overflow())
    }

    /// The product of dims; `None` on overflow.
    pub fn product<'a>(dims: impl IntoIterator<Item = &'a Dim>) -> Option<Dim> {
        dims.into_iter().try_fold(Dim::int(1), |p, d| p.checked_mul(d))
    }
}

impl From<usize> for Dim {
    fn from(n: usize) -> Self {
        Self::int(n)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut parts: Vec<String> = vec![];
        if self.num != 1 || self.syms.is_empty() {
            parts.push(self.num.to_string());
        }
        parts.extend(self.syms.iter().map(|s| s.to_string()));
        f.write_str(&parts.join("*"))?;
        if self.den != 1 {
            write!(f, "/{}", self.den)?;
        }
        Ok(())
    }
}
impl fmt::Debug for Dim {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowest_terms_and_text() {
        let l = Dim::sym("L");
        let c = l.checked_div(64).unwrap();
        assert_eq!(c.to_string(), "L/64");
        assert_eq!(c.checked_mul(&Dim::int(64)).unwrap(), l);
        assert_eq!(Dim::sym("N").checked_mul(&c).unwrap().checked_mul(&Dim::int(65)).unwrap().to_string(), "65*L*N/64");
        assert_eq!(l.checked_mul(&Dim::int(4)).unwrap().checked_quotient(&l).unwrap(), Dim::int(4));
        assert_eq!(Dim::int(4).checked_quotient(&l), None);
    }

    #[test]
    fn eval_checks_divisibility_and_binding() {
        let c = Dim::sym("L").checked_div(64).unwrap();
        assert_eq!(c.eval(&Bindings::new([("L", 128)])), Ok(2));
        assert!(c.eval(&Bindings::new([("L", 100)])).unwrap_err().to_string().contains("not divisible by 64"));
        assert!(c.eval(&Bindings::default()).unwrap_err().to_string().contains("the symbol L has no value"));
        let big = Dim::sym("L").checked_mul(&Dim::sym("L")).unwrap();
        assert!(matches!(big.eval(&Bindings::new([("L", usize::MAX)])), Err(DimError::Overflow { .. })));
    }
}
