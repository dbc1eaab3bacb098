//! Text into a graph, line by line: a broken line is reported and the next ones are still checked.
//!
//! The results of a broken line keep the types of its annotation; without one, what depends on them isn't checked.

use super::consts::{self, Consts};
use super::lexer::{Label, Spanned, Tok, lex};
use super::{ANNOTATED, is_anonymous};
use crate::attr::{Attr, AttrError};
use crate::diagnostic::{Diagnostic, nearest};
use crate::dim::{Dim, Sym};
use crate::graph::{Graph, Loc, Node, NodeId, Output, Value};
use crate::ops::{Op, OpError};
use crate::ty::{DType, Ty};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// Lists in attributes nest no deeper.
const MAX_DEPTH: usize = 16;

/// After so many errors, undefined names get no suggestion.
const MAX_SUGGESTIONS: usize = 100;

/// Parses the text form; see [`text`](crate::text).
///
/// # Errors
/// Everything wrong with the text, in its order; every span lies inside `src`.
pub fn parse(src: &str) -> Result<Graph, Vec<Diagnostic>> {
    parse_with(src, &[]).map(|p| p.0)
}

/// As [`parse`], with other values for some of the text's consts; also every const with its value, in order.
///
/// # Errors
/// As [`parse`]; a name that is no const of the text.
pub fn parse_with(src: &str, values: &[(&str, f64)]) -> Result<(Graph, Consts), Vec<Diagnostic>> {
    let mut p = Parser::new(src);
    p.given = values.iter().map(|(n, v)| (n.to_string(), *v)).collect();
    let mut at = 0;
    for line in src.split('\n') {
        let (mut toks, broken) = lex(line, at);
        at += line.len() + 1;
        consts::substitute(&mut toks, &p.consts);
        if let (Some((_, first)), Some((_, last))) = (toks.first(), toks.last()) {
            let span = first.start..last.end;
            let mut l = Line { toks: &toks, at: 0, end: last.clone() };
            p.line(&mut l, span, broken);
        } else if let Some(d) = broken {
            p.errors.push(d);
        }
    }
    for (name, _) in &p.given {
        if !p.consts.iter().any(|(n, _)| n == name) {
            let known: Vec<&str> = p.consts.iter().map(|(n, _)| n.as_str()).collect();
            let d = Diagnostic::error(format!("the graph has no const `{name}`"));
            p.errors.push(d.help(if known.is_empty() {
                "it has none".into()
            } else {
                format!("its consts: {}", known.join(", "))
            }));
        }
    }
    let consts = std::mem::take(&mut p.consts);
    p.finish(src).map(|g| (g, consts))
}

/// What is known of a label.
struct Known {
    /// `None`: its line was broken.
    value: Option<Value>,
    ty: Option<Ty>,
    /// Byte of its definition.
    at: usize,
}

#[derive(PartialEq, Clone, Copy)]
enum Stage {
    Header,
    Body,
    Returned,
    Closed,
}

struct Parser<'a> {
    src: &'a str,
    g: Graph,
    errors: Vec<Diagnostic>,
    stage: Stage,
    known: HashMap<Label, Known>,
    /// Where labels are defined anywhere, for help only; made at the first need.
    later: Option<HashMap<Label, usize>>,
    /// `None` while the header isn't read: then no symbol is reported as undeclared.
    syms: Option<HashSet<Sym>>,
    consts: Consts,
    /// Values of consts that count in place of the text's.
    given: Consts,
}

/// The tokens of one line and how far they are read.
struct Line<'t> {
    toks: &'t [Spanned],
    at: usize,
    /// Span of the last token.
    end: Range<usize>,
}

type Parsed<T> = Result<T, Diagnostic>;

impl<'t> Line<'t> {
    fn peek(&self) -> Option<&'t Tok> {
        self.toks.get(self.at).map(|(t, _)| t)
    }
    fn peek_at(&self, ahead: usize) -> Option<&'t Tok> {
        self.toks.get(self.at + ahead).map(|(t, _)| t)
    }
    /// Span of the next token; the end of the line if there is none.
    fn span(&self) -> Range<usize> {
        self.toks.get(self.at).map_or(self.end.end..self.end.end, |(_, s)| s.clone())
    }
    fn next(&mut self) -> Option<&'t Tok> {
        let t = self.peek();
        self.at += t.is_some() as usize;
        t
    }
    fn eat(&mut self, c: char) -> bool {
        let hit = self.peek() == Some(&Tok::Punct(c));
        self.at += hit as usize;
        hit
    }
    fn wanted(&self, what: &str) -> Diagnostic {
        let found = self.peek().map_or("the end of the line".into(), Tok::describe);
        Diagnostic::error(format!("expected {what}, found {found}")).at(self.span())
    }
    fn expect(&mut self, c: char) -> Parsed<()> {
        if self.eat(c) { Ok(()) } else { Err(self.wanted(&format!("`{c}`"))) }
    }
    fn done(&self) -> Parsed<()> {
        if self.peek().is_none() { Ok(()) } else { Err(self.wanted("the end of the line")) }
    }
    /// `item, item, …`, at least one.
    fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Parsed<T>) -> Parsed<Vec<T>> {
        let mut out = vec![item(self)?];
        while self.eat(',') {
            out.push(item(self)?);
        }
        Ok(out)
    }
    fn label(&mut self) -> Parsed<(Label, Range<usize>)> {
        let span = self.span();
        match self.peek() {
            Some(Tok::Label(l)) => {
                self.at += 1;
                Ok((l.clone(), span))
            }
            _ => Err(self.wanted("a value such as %x")),
        }
    }

    /// `4*L*N/64`
    fn dim(&mut self) -> Parsed<Dim> {
        let start = self.span();
        let overflow = |end: &Range<usize>| Diagnostic::error("this dim overflows").at(start.start..end.end);
        let mut d = Dim::int(1);
        loop {
            let here = self.span();
            let factor = match self.peek() {
                Some(Tok::Int(v)) => usize::try_from(*v).map(Dim::int).map_err(|_| overflow(&here))?,
                Some(Tok::Word(w)) => Dim::sym(w),
                _ => return Err(self.wanted("a dim such as 64, L or N*L/64")),
            };
            self.at += 1;
            d = d.checked_mul(&factor).ok_or_else(|| overflow(&here))?;
            while self.eat('/') {
                let here = self.span();
                match self.next() {
                    Some(Tok::Int(0)) => return Err(Diagnostic::error("a dim divided by 0").at(here)),
                    Some(Tok::Int(v)) => d = d.checked_div(*v).ok_or_else(|| overflow(&here))?,
                    _ => {
                        let d = Diagnostic::error("dims are divided by integers only").at(here);
                        return Err(d.help("write it as a product over one integer: N*L/64"));
                    }
                }
            }
            if !self.eat('*') {
                return Ok(d);
            }
        }
    }

    /// `f32[N, L]`
    fn ty(&mut self) -> Parsed<Ty> {
        let dtype = match self.peek() {
            Some(Tok::Word(w)) => DType::from_name(w).ok_or_else(|| {
                let d = Diagnostic::error(format!("unknown element type `{w}`")).at(self.span());
                let near = nearest(w, DType::ALL.map(DType::name));
                d.help(near.map_or("known: f32, bf16, f16, i32, bool".into(), |n| format!("did you mean `{n}`?")))
            })?,
            _ => return Err(self.wanted("a type such as f32[N, L]")),
        };
        self.at += 1;
        if !self.eat('[') {
            return Err(self.wanted("`[`").help(format!("a scalar's type is {dtype}[]")));
        }
        let shape = if self.peek() == Some(&Tok::Punct(']')) { vec![] } else { self.list(Self::dim)? };
        self.expect(']')?;
        Ok(Ty { dtype, shape })
    }

    fn attr(&mut self, depth: usize) -> Parsed<Attr> {
        let dim_follows = matches!(self.peek_at(1), Some(Tok::Punct('*' | '/')));
        let what = "a value such as 8, 0.5, true, recent, \"text\", [1, 2] or N*L/64";
        Ok(match self.peek() {
            Some(Tok::Punct('[')) => {
                if depth == MAX_DEPTH {
                    return Err(Diagnostic::error("lists nest too deep").at(self.span()));
                }
                self.at += 1;
                let list =
                    if self.peek() == Some(&Tok::Punct(']')) { vec![] } else { self.list(|l| l.attr(depth + 1))? };
                self.expect(']')?;
                Attr::List(list)
            }
            Some(Tok::Int(_) | Tok::Word(_)) if dim_follows => Attr::Dim(self.dim()?),
            Some(Tok::Word(w)) if self.peek_at(1) == Some(&Tok::Punct('[')) && DType::from_name(w).is_some() => {
                Attr::Ty(self.ty()?)
            }
            Some(Tok::Str(s)) => {
                self.at += 1;
                Attr::Str(s.clone())
            }
            Some(Tok::Word(w)) => {
                self.at += 1;
                match w.as_str() {
                    "true" => Attr::Bool(true),
                    "false" => Attr::Bool(false),
                    "inf" => Attr::Float(f64::INFINITY),
                    "nan" | "NaN" => Attr::Float(f64::NAN),
                    _ => Attr::Word(w.clone()),
                }
            }
            Some(Tok::Int(_) | Tok::Float(_) | Tok::Punct('-')) => self.number()?,
            _ => return Err(self.wanted(what)),
        })
    }

    fn number(&mut self) -> Parsed<Attr> {
        let start = self.span();
        let negative = self.eat('-');
        let here = self.span();
        let too_large = || Diagnostic::error("this number is too large").at(start.start..here.end);
        let v = match self.peek() {
            Some(Tok::Int(v)) if negative => Attr::Int(0i64.checked_sub_unsigned(*v).ok_or_else(too_large)?),
            Some(Tok::Int(v)) => match i64::try_from(*v) {
                Ok(v) => Attr::Int(v),
                Err(_) => Attr::Dim(usize::try_from(*v).map(Dim::int).map_err(|_| too_large())?),
            },
            Some(Tok::Float(v)) => Attr::Float(if negative { -v } else { *v }),
            Some(Tok::Word(w)) if w == "inf" => Attr::Float(if negative { f64::NEG_INFINITY } else { f64::INFINITY }),
            Some(Tok::Word(w)) if w == "nan" || w == "NaN" => Attr::Float(f64::NAN),
            _ => return Err(self.wanted("a number")),
        };
        self.at += 1;
        Ok(v)
    }
}

/// An attribute and where its name and its value are.
struct Written {
    name: String,
    attr: Attr,
    name_at: Range<usize>,
    value_at: Range<usize>,
}

impl<'a> Parser<'a> {
    fn new(src: &'a str) -> Self {
        Self {
            src,
            g: Graph::default(),
            errors: vec![],
            stage: Stage::Header,
            known: HashMap::new(),
            later: None,
            syms: None,
            consts: vec![],
            given: vec![],
        }
    }

    /// `const name = expression, …`
    fn constants(&mut self, l: &mut Line) -> Parsed<()> {
        while let Some(Tok::Word(name)) = l.peek() {
            let at = l.span();
            l.at += 1;
            if name.starts_with(|c: char| c.is_ascii_uppercase()) {
                let d = Diagnostic::error(format!("the const `{name}` must begin with a small letter")).at(at);
                return Err(d.help("capitals are symbols, whose values are given per run"));
            }
            if self.consts.iter().any(|(n, _)| n == name) {
                return Err(Diagnostic::error(format!("the const `{name}` is given twice")).at(at));
            }
            l.expect('=')?;
            let start = l.span().start;
            let mut rest = &l.toks[l.at..];
            let value = consts::value(&mut rest, &self.consts);
            l.at = l.toks.len() - rest.len();
            let end = l.toks[l.at.max(1) - 1].1.end;
            let value = value.map_err(|e| Diagnostic::error(e).at(start..end.max(start)))?;
            let value = self.given.iter().find(|(n, _)| n == name).map_or(value, |(_, v)| *v);
            self.consts.push((name.clone(), value));
            if !l.eat(',') {
                return l.done();
            }
        }
        Err(l.wanted("a const's name").help("consts are written: const chunk = 16, scale = 1/sqrt(dim)"))
    }

    fn line(&mut self, l: &mut Line, span: Range<usize>, broken: Option<Diagnostic>) {
        let failed = match (self.stage, l.peek()) {
            (Stage::Header, _) => {
                self.stage = Stage::Body;
                let is_statement = matches!(l.peek(), Some(Tok::Label(_)));
                let r = self.header(l);
                // Without its header the first line may still be a statement.
                if is_statement && broken.is_none() {
                    l.at = 0;
                    self.statement(l, span);
                }
                r
            }
            (Stage::Closed, _) => {
                let d = Diagnostic::error("text after the graph's end").at(span);
                // Once is enough.
                let again = self.errors.last().is_some_and(|e| e.message == d.message);
                if again { Ok(()) } else { Err(d.help("a file holds one graph; begin comments with #")) }
            }
            (_, Some(Tok::Punct('}'))) => {
                if self.stage != Stage::Returned {
                    let d = Diagnostic::error("the graph ends without `return`").at(l.span());
                    self.errors.push(d.help("add a line such as: return %y"));
                }
                self.stage = Stage::Closed;
                l.at += 1;
                l.done()
            }
            (Stage::Returned, _) => Err(Diagnostic::error("statement after `return`").at(span).help("move it up")),
            (_, Some(Tok::Word(w))) if w == "return" => {
                self.stage = Stage::Returned;
                l.at += 1;
                if broken.is_none() { self.returns(l) } else { Ok(()) }
            }
            (_, Some(Tok::Word(w))) if w == "const" && broken.is_none() => {
                l.at += 1;
                self.constants(l)
            }
            _ if broken.is_some() => {
                self.poison(l);
                Ok(())
            }
            _ => {
                self.statement(l, span);
                Ok(())
            }
        };
        // What the lexer refused comes first: the rest may follow from it.
        match broken {
            Some(d) => self.errors.push(d),
            None => self.errors.extend(failed.err()),
        }
    }

    /// `graph name(N, L) {`
    fn header(&mut self, l: &mut Line) -> Parsed<()> {
        let help = |d: Diagnostic| d.help("the first line is: graph name(N, L) {");
        match l.peek() {
            Some(Tok::Word(w)) if w == "graph" => l.at += 1,
            _ => return Err(help(l.wanted("`graph`"))),
        }
        match l.peek() {
            Some(Tok::Word(w) | Tok::Str(w)) => self.g.name = w.clone(),
            _ => return Err(help(l.wanted("the graph's name"))),
        }
        l.at += 1;
        l.expect('(').map_err(help)?;
        let mut seen = HashSet::new();
        while let Some(Tok::Word(w)) = l.peek() {
            let sym = Sym::new(w);
            if !w.starts_with(|c: char| c.is_ascii_uppercase()) {
                let d = Diagnostic::error(format!("the symbol `{w}` must begin with a capital")).at(l.span());
                self.errors.push(d.help("lower-case words are attribute values"));
            }
            if !seen.insert(sym.clone()) {
                self.errors.push(Diagnostic::error(format!("the symbol `{w}` is declared twice")).at(l.span()));
            } else {
                self.g.syms.push(sym);
            }
            l.at += 1;
            if !l.eat(',') {
                break;
            }
        }
        l.expect(')').map_err(help)?;
        self.syms = Some(seen);
        l.expect('{').map_err(help)?;
        l.done()
    }

    /// `return "name" = %y, %z`
    fn returns(&mut self, l: &mut Line) -> Parsed<()> {
        if l.peek().is_none() {
            return Ok(());
        }
        let all = l.list(|l| {
            let name = match l.peek() {
                Some(Tok::Str(s)) => {
                    l.at += 1;
                    l.expect('=')?;
                    Some(s.clone())
                }
                _ => None,
            };
            Ok((name, l.label()?))
        })?;
        l.done()?;
        for (name, (label, span)) in all {
            if let Some(value) = self.lookup(&label, span).and_then(|k| k.value) {
                let name = name.unwrap_or(label.name).into();
                self.g.outputs.push(Output { name, value });
            }
        }
        Ok(())
    }

    /// A line that makes values.
    fn statement(&mut self, l: &mut Line, span: Range<usize>) {
        let results = match l.list(Line::label).and_then(|r| l.expect('=').map(|()| r)) {
            Ok(r) => r,
            Err(d) => {
                self.errors.push(d.help("a statement is: %x = op %a, %b {attribute = value} : f32[N, L]"));
                return self.poison(l);
            }
        };
        if let Err(d) = self.right_side(l, &results, span) {
            self.errors.push(d);
            self.define_broken(results, Self::annotation(l));
        }
    }

    /// `op head, %a {attrs} : tys @scope`; on an error the results are not defined yet.
    fn right_side(&mut self, l: &mut Line, results: &[(Label, Range<usize>)], span: Range<usize>) -> Parsed<()> {
        let op_at = l.span();
        let Some(Tok::Word(mnemonic)) = l.peek() else { return Err(l.wanted("an operation")) };
        l.at += 1;
        let all = Op::mnemonics();
        let Some(&mnemonic) = all.iter().find(|m| *m == mnemonic) else {
            let d = Diagnostic::error(format!("unknown operation `{mnemonic}`")).at(op_at);
            return Err(match nearest(mnemonic, all.iter().copied()) {
                Some(n) => d.help(format!("did you mean `{n}`?")),
                None => d.help(format!("known: {}", all.join(", "))),
            });
        };

        let mut attrs: Vec<Written> = vec![];
        match mnemonic {
            "input" | "param" | "state" => {
                let at = l.span();
                let Some(Tok::Str(s)) = l.peek() else {
                    return Err(l.wanted("a name in quotes").help(format!("write {mnemonic} \"name\" : f32[N, L]")));
                };
                l.at += 1;
                attrs.push(Written {
                    name: "name".into(),
                    attr: Attr::Str(s.clone()),
                    name_at: at.clone(),
                    value_at: at,
                });
            }
            "constant" => {
                let at = l.span();
                let attr = match l.peek() {
                    Some(Tok::Word(w)) if matches!(w.as_str(), "true" | "false") => {
                        l.at += 1;
                        Attr::Float((w == "true") as u8 as f64)
                    }
                    _ => l.number().map_err(|d| d.help("write constant 0.5 : f32[N, L]"))?,
                };
                attrs.push(Written { name: "value".into(), attr, name_at: at.clone(), value_at: at });
            }
            _ => {}
        }
        let mut operands = vec![];
        if let Some(Tok::Label(_)) = l.peek() {
            operands = l.list(Line::label)?;
        }
        if l.eat('{') {
            self.attributes(l, &mut attrs)?;
        }
        let ty_at = l.span();
        let written =
            if l.eat(':') { Some(l.list(|l| Ok((l.span(), l.ty()?, l.toks[l.at - 1].1.end)))?) } else { None };
        let scope = match l.peek() {
            Some(Tok::Scope(s)) => {
                l.at += 1;
                Some(s.as_str().into())
            }
            _ => None,
        };
        l.done()?;
        let written: Option<Vec<(Range<usize>, Ty)>> =
            written.map(|w| w.into_iter().map(|(s, t, end)| (s.start..end, t)).collect());
        for (at, ty) in written.iter().flatten() {
            self.check_syms(ty.shape.iter(), at)?;
        }

        let op = self.op(mnemonic, attrs, written.as_deref(), op_at.clone(), ty_at.start..l.end.end)?;
        let mut inputs = vec![];
        let mut known = vec![];
        let mut missing = false;
        for (label, at) in operands {
            match self.lookup(&label, at) {
                Some(k) => {
                    inputs.push(k.value);
                    known.push(k.ty.clone());
                }
                None => missing = true,
            }
        }
        let broken = || written.iter().flatten().map(|(_, t)| t.clone()).collect::<Vec<Ty>>();
        // Reported where it arose; only the annotation is known of the results.
        let Some(tys) = known.iter().map(Option::as_ref).collect::<Option<Vec<&Ty>>>().filter(|_| !missing) else {
            let tys = broken();
            self.define_broken(results.to_vec(), (tys.len() == results.len()).then_some(tys));
            return Ok(());
        };
        let inferred = op.def().infer(&tys).map_err(|e| infer_error(mnemonic, e, span.clone()))?;
        if let Some(written) = written {
            if written.len() != inferred.len() {
                let d = format!(
                    "{mnemonic} has {}, {} written",
                    count(inferred.len(), "result"),
                    count(written.len(), "type")
                );
                return Err(Diagnostic::error(d)
                    .at(ty_at.start..l.end.end)
                    .help(format!("it gives {}", list(&inferred))));
            }
            if let Some(((at, w), t)) = written.iter().zip(&inferred).find(|((_, w), t)| w != *t) {
                let d = format!("{mnemonic} gives {t}, but {w} is written");
                return Err(Diagnostic::error(d).at(at.clone()).help("correct the type or leave it out"));
            }
        }
        if results.len() != inferred.len() {
            let d = format!("{mnemonic} has {}, {} named", count(inferred.len(), "result"), results.len());
            let at = results[0].1.start..results[results.len() - 1].1.end;
            return Err(Diagnostic::error(d).at(at).help(format!("it gives {}", list(&inferred))));
        }
        // A node with an operand from a broken line can't be built, but the graph is refused anyway.
        let inputs: Option<Vec<Value>> = inputs.into_iter().collect();
        let id = NodeId(self.g.nodes.len() as u32);
        for (i, (label, at)) in results.iter().enumerate() {
            let value = inputs.is_some().then(|| id.result(i));
            self.define(label, at.clone(), value, Some(inferred[i].clone()));
        }
        if let Some(inputs) = inputs {
            let name = |l: &Label| (l.quoted || !is_anonymous(&l.name)).then(|| l.name.as_str().into());
            let names = results.iter().map(|(l, _)| name(l)).collect();
            self.g.nodes.push(Node { op, inputs, tys: inferred, names, scope, loc: Loc::Text(span) });
        }
        Ok(())
    }

    /// `name = value, …}`
    fn attributes(&mut self, l: &mut Line, out: &mut Vec<Written>) -> Parsed<()> {
        if l.eat('}') {
            return Ok(());
        }
        let all = l.list(|l| {
            let name_at = l.span();
            let Some(Tok::Word(name)) = l.peek() else { return Err(l.wanted("an attribute's name")) };
            l.at += 1;
            l.expect('=')?;
            let start = l.span().start;
            let attr = l.attr(0)?;
            let value_at = start..l.toks[l.at - 1].1.end;
            Ok(Written { name: name.clone(), attr, name_at, value_at })
        })?;
        l.expect('}')?;
        for w in all {
            if out.iter().any(|o| o.name == w.name) {
                return Err(Diagnostic::error(format!("attribute `{}` is given twice", w.name)).at(w.name_at));
            }
            out.push(w);
        }
        Ok(())
    }

    /// The op of these attributes.
    fn op(
        &self,
        mnemonic: &str,
        attrs: Vec<Written>,
        written: Option<&[(Range<usize>, Ty)]>,
        op_at: Range<usize>,
        ty_at: Range<usize>,
    ) -> Parsed<Op> {
        let mut plain: Vec<(String, Attr)> = attrs.iter().map(|w| (w.name.clone(), w.attr.clone())).collect();
        if ANNOTATED.contains(&mnemonic) && !attrs.iter().any(|w| w.name == "ty") {
            match written {
                Some([(_, ty)]) => plain.push(("ty".into(), Attr::Ty(ty.clone()))),
                Some(_) => return Err(Diagnostic::error(format!("{mnemonic} has one type")).at(ty_at)),
                None => {
                    let d = Diagnostic::error(format!("{mnemonic} needs its type")).at(op_at);
                    return Err(d.help("write it at the end of the line: … : f32[N, L]"));
                }
            }
        }
        let find = |name: &str| attrs.iter().find(|w| w.name == name);
        let op = match Op::read(mnemonic, plain) {
            Some(Ok(op)) => op,
            None => return Err(Diagnostic::error(format!("unknown operation `{mnemonic}`")).at(op_at)),
            Some(Err(e)) => {
                let (at, help) = match &e {
                    AttrError::Missing { name } => {
                        let near = nearest(name, attrs.iter().map(|w| w.name.as_str()));
                        let add = || format!("add {{{name} = …}}");
                        (op_at, Some(near.map_or_else(add, |n| format!("did you mean `{name}` by `{n}`?"))))
                    }
                    AttrError::Wrong { name, .. } => (find(name).map_or(op_at, |w| w.value_at.clone()), None),
                    AttrError::Unknown { name, known } => (
                        find(name).map_or(op_at, |w| w.name_at.clone()),
                        nearest(name, known.split(", ").filter(|k| *k != "none"))
                            .map(|n| format!("did you mean `{n}`?")),
                    ),
                };
                let d = Diagnostic::error(format!("{mnemonic}: {e}")).at(at);
                return Err(Diagnostic { help, ..d });
            }
        };
        for (name, a) in op.attrs() {
            let at = find(name).map_or(op_at.clone(), |w| w.value_at.clone());
            self.check_syms(dims_of(&a).into_iter(), &at)?;
        }
        Ok(op)
    }

    fn check_syms<'d>(&self, dims: impl Iterator<Item = &'d Dim>, at: &Range<usize>) -> Parsed<()> {
        let Some(declared) = &self.syms else { return Ok(()) };
        for s in dims.flat_map(|d| d.syms()) {
            if !declared.contains(s) {
                let d = Diagnostic::error(format!("the symbol `{s}` is not declared")).at(at.clone());
                let known: Vec<&str> = self.g.syms.iter().map(Sym::as_str).collect();
                let near = nearest(s.as_str(), known.iter().copied()).map(|n| format!("did you mean `{n}`?"));
                let declare = || {
                    let all = known.iter().copied().chain([s.as_str()]).collect::<Vec<_>>().join(", ");
                    format!("declare it in the first line: graph {}({all}) {{", self.g.name)
                };
                if !s.as_str().starts_with(|c: char| c.is_ascii_uppercase()) {
                    return Err(
                        d.help(near.unwrap_or_else(|| format!("give it a value before its use: const {s} = 16")))
                    );
                }
                return Err(d.help(near.unwrap_or_else(declare)));
            }
        }
        Ok(())
    }

    /// What `label` stands for; reports it if nothing.
    fn lookup(&mut self, label: &Label, at: Range<usize>) -> Option<&Known> {
        if !self.known.contains_key(label) {
            let later = self.later.get_or_insert_with(|| later(self.src)).get(label).copied();
            let d = Diagnostic::error(format!("%{} is not defined", label.text())).at(at);
            let d = match later {
                Some(line) => d.help(format!("line {line} defines it; a value must be defined before its use")),
                // Looking for likenesses is slow, and nobody reads that many.
                None if self.errors.len() >= MAX_SUGGESTIONS => d,
                None => {
                    let all: Vec<String> = self.known.keys().map(Label::text).collect();
                    let mut all: Vec<&str> = all.iter().map(String::as_str).collect();
                    all.sort();
                    // Digits are all alike.
                    match nearest(&label.text(), all).filter(|_| !is_anonymous(&label.name)) {
                        Some(n) => d.help(format!("did you mean `%{n}`?")),
                        None => d,
                    }
                }
            };
            self.errors.push(d);
            return None;
        }
        self.known.get(label)
    }

    fn define(&mut self, label: &Label, at: Range<usize>, value: Option<Value>, ty: Option<Ty>) {
        if let Some(first) = self.known.get(label) {
            let line = self.src[..first.at].matches('\n').count() + 1;
            let d = Diagnostic::error(format!("%{} is defined twice", label.text())).at(at);
            self.errors.push(d.help(format!("line {line} defines it; choose another name")));
        } else {
            self.known.insert(label.clone(), Known { value, ty, at: at.start });
        }
    }

    fn define_broken(&mut self, results: Vec<(Label, Range<usize>)>, tys: Option<Vec<Ty>>) {
        let tys = tys.filter(|t| t.len() == results.len());
        for (i, (label, at)) in results.into_iter().enumerate() {
            let ty = tys.as_ref().map(|t| t[i].clone());
            self.define(&label, at, None, ty);
        }
    }

    /// The types written on a broken line, if they can be read.
    fn annotation(l: &Line) -> Option<Vec<Ty>> {
        let colon = l.toks.iter().position(|(t, _)| *t == Tok::Punct(':'))?;
        let mut rest = Line { toks: l.toks, at: colon + 1, end: l.end.clone() };
        rest.list(Line::ty).ok()
    }

    /// Defines whatever stands before `=` on a broken line, so that its uses aren't reported too.
    fn poison(&mut self, l: &Line) {
        let Some(equals) = l.toks.iter().position(|(t, _)| *t == Tok::Punct('=')) else { return };
        let before = l.toks[..equals].iter();
        let labels =
            before.filter_map(|(t, s)| if let Tok::Label(l) = t { Some((l.clone(), s.clone())) } else { None });
        self.define_broken(labels.collect(), Self::annotation(l));
    }

    fn finish(mut self, src: &str) -> Result<Graph, Vec<Diagnostic>> {
        let end = src.trim_end().len();
        match self.stage {
            Stage::Closed => {}
            Stage::Header => {
                let d = Diagnostic::error("there is no graph in this text").at(end..end);
                self.errors.push(d.help("the first line is: graph name(N, L) {"));
            }
            Stage::Body => {
                let d = Diagnostic::error("the text ends inside the graph").at(end..end);
                self.errors.push(d.help("add a line such as `return %y`, then `}`"));
            }
            Stage::Returned => self.errors.push(Diagnostic::error("the closing `}` is missing").at(end..end)),
        }
        if self.errors.is_empty() { Ok(self.g) } else { Err(self.errors) }
    }
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn list(tys: &[Ty]) -> String {
    tys.iter().map(|t| t.to_string()).collect::<Vec<_>>().join(", ")
}

fn infer_error(mnemonic: &str, e: OpError, span: Range<usize>) -> Diagnostic {
    Diagnostic::error(format!("{mnemonic}: {e}")).at(span)
}

/// Every dim in an attribute.
pub(crate) fn dims_of(a: &Attr) -> Vec<&Dim> {
    match a {
        Attr::Dim(d) => vec![d],
        Attr::Ty(t) => t.shape.iter().collect(),
        Attr::List(v) => v.iter().flat_map(dims_of).collect(),
        _ => vec![],
    }
}

/// The line on which each label stands to the left of `=`.
fn later(src: &str) -> HashMap<Label, usize> {
    let mut out = HashMap::new();
    for (i, line) in src.split('\n').enumerate() {
        let (toks, _) = lex(line, 0);
        for (t, _) in toks {
            match t {
                Tok::Label(l) => {
                    out.entry(l).or_insert(i + 1);
                }
                Tok::Punct(',') => {}
                _ => break,
            }
        }
    }
    out
}
