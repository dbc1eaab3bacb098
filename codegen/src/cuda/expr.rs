//! Sizes of launches: what dims can't say, such as a number of tiles rounded up.

use rambac_ir::{Bindings, Dim, DimError};
use std::fmt;

/// An integer that is known when the symbols are bound.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Expr {
    Dim(Dim),
    /// Divided and rounded up.
    CeilDiv(Box<Expr>, u64),
    /// The same by a number that is known as late; by 0 it is 0.
    CeilDivBy(Box<Expr>, Box<Expr>),
    Add(Box<Expr>, Box<Expr>),
    /// The difference, at least 0.
    Sub(Box<Expr>, Box<Expr>),
    Mul(Box<Expr>, Box<Expr>),
    Min(Box<Expr>, Box<Expr>),
    Max(Box<Expr>, Box<Expr>),
}

impl Expr {
    pub fn int(n: usize) -> Expr {
        Expr::Dim(Dim::int(n))
    }
    /// The product of dims.
    pub fn product(dims: &[Dim]) -> Expr {
        match Dim::product(dims) {
            Some(d) => Expr::Dim(d),
            None => dims.iter().fold(Expr::int(1), |e, d| e * d.clone()),
        }
    }
    pub fn ceil_div(self, n: usize) -> Expr {
        assert!(n > 0, "BUG: division by zero");
        match self {
            e if n == 1 => e,
            e => match e.as_int() {
                Some(v) => Expr::int(v.div_ceil(n)),
                None => Expr::CeilDiv(Box::new(e), n as u64),
            },
        }
    }
    /// What is left after taking `o` away, at least 0.
    pub fn less(self, o: impl Into<Expr>) -> Expr {
        Expr::Sub(Box::new(self), Box::new(o.into()))
    }
    /// As [`ceil_div`](Self::ceil_div), by a number that is known as late.
    pub fn ceil_div_by(self, o: impl Into<Expr>) -> Expr {
        let o = o.into();
        match o.as_int() {
            Some(n) if n > 0 => self.ceil_div(n),
            _ => Expr::CeilDivBy(Box::new(self), Box::new(o)),
        }
    }
    pub fn min(self, o: impl Into<Expr>) -> Expr {
        Expr::Min(Box::new(self), Box::new(o.into()))
    }
    pub fn max(self, o: impl Into<Expr>) -> Expr {
        Expr::Max(Box::new(self), Box::new(o.into()))
    }
    /// The value, if no symbol matters.
    pub fn as_int(&self) -> Option<usize> {
        match self {
            Expr::Dim(d) => d.as_int(),
            _ => None,
        }
    }
    /// The value under `b`.
    ///
    /// # Errors
    /// A symbol without a value, an indivisible dim, an overflow.
    pub fn eval(&self, b: &Bindings) -> Result<usize, DimError> {
        let two = |x: &Expr, y: &Expr| Ok::<_, DimError>((x.eval(b)?, y.eval(b)?));
        let fits =
            |v: Option<usize>| v.ok_or_else(|| DimError::Overflow { dim: self.to_string(), bindings: b.to_string() });
        match self {
            Expr::Dim(d) => d.eval(b),
            Expr::CeilDiv(x, n) => Ok(x.eval(b)?.div_ceil(*n as usize)),
            Expr::CeilDivBy(x, y) => two(x, y).map(|(x, y)| if y == 0 { 0 } else { x.div_ceil(y) }),
            Expr::Add(x, y) => two(x, y).and_then(|(x, y)| fits(x.checked_add(y))),
            Expr::Sub(x, y) => two(x, y).map(|(x, y)| x.saturating_sub(y)),
            Expr::Mul(x, y) => two(x, y).and_then(|(x, y)| fits(x.checked_mul(y))),
            Expr::Min(x, y) => two(x, y).map(|(x, y)| x.min(y)),
            Expr::Max(x, y) => two(x, y).map(|(x, y)| x.max(y)),
        }
    }
}

impl From<Dim> for Expr {
    fn from(d: Dim) -> Expr {
        Expr::Dim(d)
    }
}
impl From<&Dim> for Expr {
    fn from(d: &Dim) -> Expr {
        Expr::Dim(d.clone())
    }
}
impl From<usize> for Expr {
    fn from(n: usize) -> Expr {
        Expr::int(n)
    }
}
impl<E: Into<Expr>> std::ops::Mul<E> for Expr {
    type Output = Expr;
    fn mul(self, o: E) -> Expr {
        match (self, o.into()) {
            (Expr::Dim(a), Expr::Dim(b)) if a.checked_mul(&b).is_some() => {
                Expr::Dim(a.checked_mul(&b).expect("BUG: tested in the guard"))
            }
            (a, b) => Expr::Mul(Box::new(a), Box::new(b)),
        }
    }
}
impl<E: Into<Expr>> std::ops::Add<E> for Expr {
    type Output = Expr;
    fn add(self, o: E) -> Expr {
        match (self.as_int(), o.into()) {
            (Some(0), e) => e,
            (Some(a), e) => match e.as_int().and_then(|b| a.checked_add(b)) {
                Some(s) => Expr::int(s),
                None => Expr::Add(Box::new(self), Box::new(e)),
            },
            (None, e) => Expr::Add(Box::new(self), Box::new(e)),
        }
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Expr::Dim(d) => write!(f, "{d}"),
            Expr::CeilDiv(x, n) => write!(f, "ceil({x} / {n})"),
            Expr::CeilDivBy(x, y) => write!(f, "ceil({x} / {y})"),
            Expr::Add(x, y) => write!(f, "({x} + {y})"),
            Expr::Sub(x, y) => write!(f, "({x} - {y})"),
            Expr::Mul(x, y) => write!(f, "{x}·{y}"),
            Expr::Min(x, y) => write!(f, "min({x}, {y})"),
            Expr::Max(x, y) => write!(f, "max({x}, {y})"),
        }
    }
}
impl fmt::Debug for Expr {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_launches() {
        let b = Bindings::new([("N", 3), ("L", 100)]);
        let tiles = Expr::from(Dim::sym("L")).ceil_div(64) * Dim::sym("N");
        assert_eq!((tiles.to_string().as_str(), tiles.eval(&b)), ("ceil(L / 64)·N", Ok(6)));
        assert_eq!(tiles.min(4).eval(&b), Ok(4));
        assert_eq!((Expr::int(2) + 3).as_int(), Some(5));
        let huge = Expr::int(usize::MAX) + Dim::sym("N");
        assert!(matches!(huge.eval(&b), Err(DimError::Overflow { .. })));
    }
}
