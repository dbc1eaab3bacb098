//! PTX text → [`ast::Module`].  Knows the grammar of statements, not one instruction.
//!
//! Deliberately absent: call tables (indirect calls); debug sections are skipped.

pub mod ast;
mod lexer;

use crate::error::PtxError;
use crate::isa::Ty;
use ast::{Function, Inst, Module, Operand, Source, Space, Stmt, Var};
use lexer::{Spanned, Token};

type Result<T> = std::result::Result<T, PtxError>;

/// Reads a module.
pub fn parse(text: &str) -> Result<Module> {
    let mut p = Parser { tokens: lexer::tokens(text)?, at: 0 };
    p.module()
}

struct Parser {
    tokens: Vec<Spanned>,
    at: usize,
}

impl Parser {
    fn line(&self) -> u32 {
        let last = self.tokens.len().saturating_sub(1);
        self.tokens.get(self.at.min(last)).map_or(1, |t| t.line)
    }

    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|t| &t.token)
    }

    fn is(&self, c: char) -> bool {
        self.peek() == Some(&Token::Punct(c))
    }

    fn eat(&mut self, c: char) -> bool {
        let yes = self.is(c);
        self.at += usize::from(yes);
        yes
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(PtxError::new(self.line(), message))
    }

    fn found(&self) -> String {
        match self.peek() {
            None => "the file ends".into(),
            Some(Token::Word(w)) => format!("\"{w}\" stands here"),
            Some(Token::Punct(c)) => format!("'{c}' stands here"),
            Some(_) => "a constant stands here".into(),
        }
    }

    fn want(&mut self, c: char) -> Result<()> {
        if self.eat(c) { Ok(()) } else { self.error(format!("'{c}' is expected, {}", self.found())) }
    }

    fn word(&mut self, what: &str) -> Result<String> {
        match self.tokens.get(self.at) {
            Some(Spanned { token: Token::Word(w), .. }) => {
                self.at += 1;
                Ok(w.clone())
            }
            _ => self.error(format!("{what} is expected, {}", self.found())),
        }
    }

    fn int(&mut self) -> Result<i64> {
        let negative = self.eat('-');
        match self.peek() {
            Some(&Token::Int(v)) => {
                self.at += 1;
                Ok(if negative { (v as i64).wrapping_neg() } else { v as i64 })
            }
            _ => self.error(format!("a whole number is expected, {}", self.found())),
        }
    }

    fn skip_past(&mut self, c: char) {
        while self.peek().is_some() && !self.eat(c) {
            self.at += 1;
        }
    }

    fn skip_braces(&mut self) -> Result<()> {
        self.want('{')?;
        let mut depth = 1;
        while depth > 0 {
            match self.peek() {
                None => return self.error("'}' is missing"),
                Some(Token::Punct('{')) => depth += 1,
                Some(Token::Punct('}')) => depth -= 1,
                _ => {}
            }
            self.at += 1;
        }
        Ok(())
    }

    fn module(&mut self) -> Result<Module> {
        let mut m = Module { version: (0, 0), target: String::new(), vars: vec![], functions: vec![], files: vec![] };
        while let Some(token) = self.peek().cloned() {
            let Token::Word(word) = token else {
                return self.error(format!("a directive is expected, {}", self.found()));
            };
            match word.as_str() {
                ".version" => {
                    self.at += 1;
                    m.version = match self.peek().cloned() {
                        Some(Token::F64(bits)) => {
                            let v = (f64::from_bits(bits) * 10.0).round() as u32;
                            (v / 10, v % 10)
                        }
                        _ => return self.error("a version such as 8.0 is expected"),
                    };
                    self.at += 1;
                }
                ".target" => {
                    self.at += 1;
                    m.target = self.word("a target")?;
                    while self.eat(',') {
                        self.word("a target's option")?;
                    }
                }
                ".address_size" => {
                    self.at += 1;
                    if self.int()? != 64 {
                        return self.error("only 64-bit addresses are known: compile with --machine=64");
                    }
                }
                ".file" => {
                    self.at += 1;
                    let number = self.int()? as u32;
                    let Some(Token::Text(name)) = self.peek().cloned() else {
                        return self.error("a file's name is expected");
                    };
                    self.at += 1;
                    while self.eat(',') {
                        self.int()?;
                    }
                    m.files.push((number, name));
                }
                ".section" => {
                    self.at += 1;
                    self.word("a section's name")?;
                    self.skip_braces()?;
                }
                ".pragma" | ".alias" => self.skip_past(';'),
                ".loc" => {
                    self.loc()?;
                }
                _ => self.top_level(&mut m)?,
            }
        }
        if m.target.is_empty() {
            return Err(PtxError::new(1, "this is no PTX: .version and .target are missing"));
        }
        Ok(m)
    }

    /// `.visible .entry …`, `.func …`, `.global …`.
    fn top_level(&mut self, m: &mut Module) -> Result<()> {
        let mut external = false;
        loop {
            let line = self.line();
            let word = self.word("a directive")?;
            match word.as_str() {
                ".visible" | ".weak" | ".common" => {}
                ".extern" => external = true,
                ".entry" | ".func" => {
                    let f = self.function(word == ".entry", line)?;
                    // A prototype, then the function: the one with a body counts.
                    match m.functions.iter_mut().find(|g| g.name == f.name) {
                        Some(old) if f.has_body => *old = f,
                        Some(_) => {}
                        None => m.functions.push(f),
                    }
                    return Ok(());
                }
                ".global" | ".const" | ".shared" => {
                    let space = space(&word).unwrap_or(Space::Global);
                    m.vars.extend(self.vars(space, external)?);
                    return Ok(());
                }
                _ => return Err(PtxError::new(line, format!("\"{word}\" is not known here"))),
            }
        }
    }

    fn function(&mut self, entry: bool, line: u32) -> Result<Function> {
        let returns = if self.is('(') { self.params()? } else { vec![] };
        let name = self.word("a function's name")?;
        let params = if self.is('(') { self.params()? } else { vec![] };
        let mut f = Function {
            name,
            entry,
            returns,
            params,
            body: vec![],
            has_body: false,
            required_block: None,
            max_threads: None,
            cluster: None,
            line,
        };
        loop {
            if self.eat(';') {
                return Ok(f);
            }
            if self.is('{') {
                f.has_body = true;
                f.body = self.body()?;
                return Ok(f);
            }
            let word = self.word("a function's body")?;
            match word.as_str() {
                ".maxntid" => f.max_threads = Some(self.triple()?.iter().product()),
                ".reqntid" => f.required_block = Some(self.triple()?),
                ".reqnctapercluster" => f.cluster = Some(self.triple()?),
                ".minnctapersm" | ".maxnctapersm" | ".maxnreg" | ".maxclusterrank" => {
                    self.int()?;
                }
                ".explicitcluster" | ".noreturn" | ".blocksareclusters" => {}
                ".pragma" | ".attribute" => self.skip_past(';'),
                _ => return self.error(format!("\"{word}\" is not known before a function's body")),
            }
        }
    }

    fn triple(&mut self) -> Result<[u32; 3]> {
        let mut t = [1; 3];
        t[0] = self.int()? as u32;
        for v in &mut t[1..] {
            if self.eat(',') {
                *v = self.int()? as u32;
            }
        }
        Ok(t)
    }

    /// `(.param .u64 a, .param .align 64 .b8 b[128])`
    fn params(&mut self) -> Result<Vec<Var>> {
        self.want('(')?;
        let mut all = vec![];
        while !self.eat(')') {
            let word = self.word("a parameter")?;
            if word != ".param" {
                return self.error(format!("parameters are .param here, not {word}"));
            }
            all.push(self.var(Space::Param, false)?);
            if !self.eat(',') && !self.is(')') {
                return self.error(format!("',' or ')' is expected, {}", self.found()));
            }
        }
        Ok(all)
    }

    fn vars(&mut self, space: Space, external: bool) -> Result<Vec<Var>> {
        let first = self.var(space, external)?;
        let mut all = vec![first];
        while self.eat(',') {
            let mut v = all[0].clone();
            self.declarator(&mut v, external)?;
            all.push(v);
        }
        self.want(';')?;
        Ok(all)
    }

    fn var(&mut self, space: Space, external: bool) -> Result<Var> {
        let line = self.line();
        let (mut align, mut ty, mut lanes) = (0, None, 1);
        while matches!(self.peek(), Some(Token::Word(w)) if w.starts_with('.')) {
            let word = self.word("a type")?;
            match word.as_str() {
                ".align" => align = self.int()? as u64,
                ".v2" => lanes = 2,
                ".v4" => lanes = 4,
                ".ptr" | ".global" | ".shared" | ".const" | ".local" => {}
                ".attribute" => {
                    self.want('(')?;
                    self.skip_past(')');
                }
                _ => match Ty::named(&word[1..]) {
                    Some(t) => ty = Some(t),
                    None => return self.error(format!("\"{word}\" is not a type")),
                },
            }
        }
        let Some(ty) = ty else { return self.error("a variable needs a type") };
        let bytes = ty.bytes() as u64 * lanes;
        let mut v = Var {
            space,
            name: String::new(),
            align: if align == 0 { bytes.max(1) } else { align },
            ty,
            bytes,
            init: vec![],
            addresses: vec![],
            line,
        };
        self.declarator(&mut v, external)?;
        Ok(v)
    }

    /// `name`, `name[4][2] = {…}`
    fn declarator(&mut self, v: &mut Var, external: bool) -> Result<()> {
        v.name = self.word("a variable's name")?;
        let element = v.bytes;
        let mut bytes = Some(element);
        while self.eat('[') {
            if self.eat(']') {
                bytes = None;
                continue;
            }
            let n = self.int()?;
            let fits = u64::try_from(n).ok().and_then(|n| bytes?.checked_mul(n)).filter(|&b| b < 1 << 40);
            match (fits, bytes) {
                (Some(b), _) => bytes = Some(b),
                (None, None) => {}
                _ => return self.error(format!("{} elements are too many", n)),
            }
            self.want(']')?;
        }
        if self.eat('=') {
            self.initial(v)?;
        }
        v.bytes = match bytes {
            Some(b) => b,
            None if external || !v.init.is_empty() => v.init.len() as u64,
            None if v.space == Space::Param => return self.error("a parameter needs a size"),
            None => 0,
        };
        Ok(())
    }

    fn initial(&mut self, v: &mut Var) -> Result<()> {
        if self.eat('{') {
            while !self.eat('}') {
                self.initial(v)?;
                if !self.eat(',') && !self.is('}') {
                    return self.error(format!("',' or '}}' is expected, {}", self.found()));
                }
            }
            return Ok(());
        }
        let width = v.ty.bytes();
        let negative = self.eat('-');
        let bits = match self.peek().cloned() {
            Some(Token::Int(i)) if v.ty == Ty::F64 => (i as f64).to_bits(),
            Some(Token::Int(i)) if v.ty == Ty::F32 => u64::from((i as f32).to_bits()),
            Some(Token::Int(i)) => {
                if negative {
                    i.wrapping_neg()
                } else {
                    i
                }
            }
            Some(Token::F32(b)) => u64::from(b),
            Some(Token::F64(b)) if v.ty == Ty::F32 => u64::from((f64::from_bits(b) as f32).to_bits()),
            Some(Token::F64(b)) => b,
            Some(Token::Word(w)) => {
                let generic = w == "generic";
                let name = if generic {
                    self.at += 1;
                    self.want('(')?;
                    let name = self.word("a variable's name")?;
                    self.at -= 1;
                    name
                } else {
                    w
                };
                v.addresses.push((v.init.len() as u64, name, 0, generic));
                if generic {
                    self.at += 1;
                    self.want(')')?;
                    self.at -= 1;
                }
                0
            }
            _ => return self.error(format!("an initial value is expected, {}", self.found())),
        };
        self.at += 1;
        if self.eat('+')
            && let Ok(more) = self.int()
            && let Some(last) = v.addresses.last_mut()
        {
            last.2 = more;
        }
        v.init.extend_from_slice(&bits.to_le_bytes()[..width]);
        Ok(())
    }

    fn loc(&mut self) -> Result<Source> {
        self.at += 1;
        let mut s = Source { file: 0, line: 0, column: 0, inlined_at: None };
        s.file = self.int()? as u32;
        s.line = self.int()? as u32;
        s.column = self.int()? as u32;
        while self.eat(',') {
            match self.word("function_name or inlined_at")?.as_str() {
                "function_name" => {
                    self.word("a name")?;
                    if self.eat('+') {
                        self.int()?;
                    }
                }
                "inlined_at" => {
                    s.inlined_at = Some((self.int()? as u32, self.int()? as u32));
                    self.int()?;
                }
                other => return self.error(format!("\"{other}\" is not known in .loc")),
            }
        }
        Ok(s)
    }

    fn body(&mut self) -> Result<Vec<Stmt>> {
        self.want('{')?;
        let mut out = vec![];
        let mut depth = 1;
        loop {
            let line = self.line();
            if self.eat('{') {
                depth += 1;
                out.push(Stmt::Open);
                continue;
            }
            if self.eat('}') {
                depth -= 1;
                if depth == 0 {
                    return Ok(out);
                }
                out.push(Stmt::Close);
                continue;
            }
            if self.eat(';') {
                continue;
            }
            let guard = if self.eat('@') {
                let negated = self.eat('!');
                Some((self.word("a predicate")?, negated))
            } else {
                None
            };
            let Some(Token::Word(word)) = self.peek().cloned() else {
                return self.error(format!("an instruction is expected, {}", self.found()));
            };
            if guard.is_none() && self.tokens.get(self.at + 1).is_some_and(|t| t.token == Token::Punct(':')) {
                self.at += 2;
                out.push(Stmt::Label(word, line));
                continue;
            }
            match word.as_str() {
                ".loc" => out.push(Stmt::Loc(self.loc()?)),
                ".pragma" => self.skip_past(';'),
                ".branchtargets" => {
                    self.at += 1;
                    let mut all = vec![self.word("a label")?];
                    while self.eat(',') {
                        all.push(self.word("a label")?);
                    }
                    self.want(';')?;
                    out.push(Stmt::Targets(all));
                }
                ".reg" => {
                    self.at += 1;
                    out.push(self.registers()?);
                }
                ".shared" | ".local" | ".param" | ".const" | ".global" => {
                    self.at += 1;
                    let s = space(&word).unwrap_or(Space::Local);
                    out.extend(self.vars(s, false)?.into_iter().map(Stmt::Var));
                }
                _ if word.starts_with('.') => return self.error(format!("\"{word}\" is not known within a function")),
                _ => {
                    self.at += 1;
                    out.push(Stmt::Inst(self.instruction(word, guard, line)?));
                }
            }
        }
    }

    fn registers(&mut self) -> Result<Stmt> {
        let word = self.word("a register's type")?;
        let Some(ty) = word.strip_prefix('.').and_then(Ty::named) else {
            return self.error(format!("\"{word}\" is no type of a register"));
        };
        let mut names = vec![];
        loop {
            let name = self.word("a register's name")?;
            let count = if self.eat('<') {
                let n = self.int()?;
                self.want('>')?;
                match u32::try_from(n) {
                    Ok(n) if n < 1 << 20 => n,
                    _ => return self.error(format!("{n} registers are too many")),
                }
            } else {
                0
            };
            names.push((name, count));
            if !self.eat(',') {
                break;
            }
        }
        self.want(';')?;
        Ok(Stmt::Reg { ty, names })
    }

    fn instruction(&mut self, opcode: String, guard: Option<(String, bool)>, line: u32) -> Result<Inst> {
        let mut operands = vec![];
        while !self.eat(';') {
            operands.push(self.operand()?);
            if !self.eat(',') && !self.is(';') {
                return self.error(format!("',' or ';' is expected after an operand of {opcode}, {}", self.found()));
            }
        }
        Ok(Inst { guard, parts: opcode.split('.').map(str::to_string).collect(), operands, line })
    }

    fn operand(&mut self) -> Result<Operand> {
        let first = self.simple_operand()?;
        if self.eat('|') {
            let second = self.simple_operand()?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    fn list(&mut self, end: char) -> Result<Vec<Operand>> {
        let mut all = vec![];
        while !self.eat(end) {
            all.push(self.operand()?);
            if !self.eat(',') && !self.is(end) {
                return self.error(format!("',' or '{end}' is expected, {}", self.found()));
            }
        }
        Ok(all)
    }

    fn simple_operand(&mut self) -> Result<Operand> {
        if self.eat('{') {
            return Ok(Operand::List(self.list('}')?));
        }
        if self.eat('(') {
            return Ok(Operand::List(self.list(')')?));
        }
        if self.eat('!') {
            return Ok(Operand::Not(self.word("a predicate")?));
        }
        if self.eat('[') {
            let (mut base, mut offset) = (None, 0);
            match self.peek().cloned() {
                Some(Token::Word(w)) => {
                    self.at += 1;
                    base = Some(w);
                    if self.eat('+') || self.is('-') {
                        offset = self.int()?;
                    }
                }
                _ => offset = self.int()?,
            }
            let inner = if self.eat(',') {
                self.list(']')?
            } else {
                self.want(']')?;
                vec![]
            };
            return Ok(Operand::Address { base, offset, inner });
        }
        let negative = self.eat('-');
        match self.peek().cloned() {
            Some(Token::Word(w)) if !negative => {
                self.at += 1;
                if self.eat('+') || self.is('-') {
                    return Ok(Operand::Offset(w, self.int()?));
                }
                Ok(Operand::Name(w))
            }
            Some(Token::Int(i)) => {
                self.at += 1;
                Ok(Operand::Int(if negative { (i as i64).wrapping_neg() } else { i as i64 }))
            }
            Some(Token::F32(b)) => {
                self.at += 1;
                Ok(Operand::F32(if negative { b ^ 1 << 31 } else { b }))
            }
            Some(Token::F64(b)) => {
                self.at += 1;
                Ok(Operand::F64(if negative { b ^ 1 << 63 } else { b }))
            }
            _ => self.error(format!("an operand is expected, {}", self.found())),
        }
    }
}

fn space(word: &str) -> Option<Space> {
    Some(match word.trim_start_matches('.') {
        "global" => Space::Global,
        "shared" => Space::Shared,
        "const" => Space::Const,
        "local" => Space::Local,
        "param" => Space::Param,
        _ => return None,
    })
}
