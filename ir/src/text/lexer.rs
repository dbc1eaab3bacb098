//! One line of text into tokens with their byte spans.

use super::{is_anonymous, is_label_char, is_scope_char};
use crate::diagnostic::Diagnostic;
use std::iter::Peekable;
use std::ops::Range;
use std::str::CharIndices;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Tok {
    /// `abc_1`
    Word(String),
    /// `%x`, `%"odd"~2`
    Label(Label),
    /// `"text"`, unescaped.
    Str(String),
    /// `8`
    Int(u64),
    /// `0.5`, `1e-5`
    Float(f64),
    /// `@layers.3`
    Scope(String),
    /// One of `=,:{}[]()*/-+`
    Punct(char),
}

/// A value's label.  Two are the same value's exactly if they are equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Label {
    pub name: String,
    /// Whether it must be written in quotes.
    pub quoted: bool,
    /// The number that tells it from others of that name.
    pub nth: Option<u64>,
}

impl Label {
    /// As it is written, without `%`.
    pub fn text(&self) -> String {
        let name = if self.quoted { crate::attr::quoted(&self.name) } else { self.name.clone() };
        match self.nth {
            Some(n) => format!("{name}~{n}"),
            None => name,
        }
    }
}

impl Tok {
    /// What it is, for "expected …, found …".
    pub fn describe(&self) -> String {
        match self {
            Tok::Word(w) => format!("`{w}`"),
            Tok::Label(l) => format!("`%{}`", l.text()),
            Tok::Str(s) => crate::attr::quoted(s),
            Tok::Int(v) => format!("`{v}`"),
            Tok::Float(v) => format!("`{v:?}`"),
            Tok::Scope(s) => format!("`@{s}`"),
            Tok::Punct(c) => format!("`{c}`"),
        }
    }
}

pub(super) type Spanned = (Tok, Range<usize>);

struct Lexer<'a> {
    line: &'a str,
    /// Where the line begins in the text.
    base: usize,
    chars: Peekable<CharIndices<'a>>,
}

/// The tokens of `line`, which begins at byte `base` of the text.  On an error, the tokens before it come too.
pub(super) fn lex(line: &str, base: usize) -> (Vec<Spanned>, Option<Diagnostic>) {
    let mut lx = Lexer { line, base, chars: line.char_indices().peekable() };
    let mut out = vec![];
    loop {
        match lx.token() {
            Ok(Some(t)) => out.push(t),
            Ok(None) => return (out, None),
            Err(d) => return (out, Some(d)),
        }
    }
}

impl Lexer<'_> {
    /// Byte of the next character in the line.
    fn pos(&mut self) -> usize {
        self.chars.peek().map_or(self.line.len(), |&(i, _)| i)
    }
    fn peek(&mut self) -> Option<char> {
        self.chars.peek().map(|&(_, c)| c)
    }
    fn take_while(&mut self, f: impl Fn(char) -> bool) -> &str {
        let start = self.pos();
        while self.peek().is_some_and(&f) {
            self.chars.next();
        }
        let end = self.pos();
        &self.line[start..end]
    }
    fn span(&mut self, start: usize) -> Range<usize> {
        self.base + start..self.base + self.pos()
    }

    fn token(&mut self) -> Result<Option<Spanned>, Diagnostic> {
        self.take_while(char::is_whitespace);
        let start = self.pos();
        let Some(c) = self.peek() else { return Ok(None) };
        let tok = match c {
            '#' => return Ok(None),
            '/' if self.line[start..].starts_with("//") => return Ok(None),
            '=' | ',' | ':' | '{' | '}' | '[' | ']' | '(' | ')' | '*' | '/' | '-' | '+' => {
                self.chars.next();
                Tok::Punct(c)
            }
            '"' => Tok::Str(self.string()?),
            '%' => self.label()?,
            '@' => self.scope()?,
            c if c.is_ascii_digit() => self.number()?,
            c if c.is_ascii_alphabetic() || c == '_' => {
                Tok::Word(self.take_while(|c| c.is_ascii_alphanumeric() || c == '_').to_string())
            }
            c => {
                self.chars.next();
                let d = Diagnostic::error(format!("unexpected character {c:?}")).at(self.span(start));
                return Err(d.help("names with such characters are quoted: %\"…\""));
            }
        };
        Ok(Some((tok, self.span(start))))
    }

    fn label(&mut self) -> Result<Tok, Diagnostic> {
        let start = self.pos();
        self.chars.next();
        let quoted = self.peek() == Some('"');
        let name = if quoted { self.string()? } else { self.take_while(is_label_char).to_string() };
        if name.is_empty() && !quoted {
            return Err(Diagnostic::error("`%` without a name").at(self.span(start)).help("write %name or %7"));
        }
        let quoted = quoted && (name.is_empty() || !name.chars().all(is_label_char) || is_anonymous(&name));
        let mut nth = None;
        if self.peek() == Some('~') {
            self.chars.next();
            nth = self.take_while(|c| c.is_ascii_digit()).parse().ok();
            if nth.is_none() {
                return Err(Diagnostic::error("expected a number after `~`").at(self.span(start)));
            }
        }
        Ok(Tok::Label(Label { name, quoted, nth }))
    }

    fn scope(&mut self) -> Result<Tok, Diagnostic> {
        let start = self.pos();
        self.chars.next();
        if self.peek() == Some('"') {
            return Ok(Tok::Scope(self.string()?));
        }
        let s = self.take_while(is_scope_char).to_string();
        if s.is_empty() {
            return Err(Diagnostic::error("`@` without a scope").at(self.span(start)).help("write @layers.3"));
        }
        Ok(Tok::Scope(s))
    }

    fn number(&mut self) -> Result<Tok, Diagnostic> {
        let start = self.pos();
        let mut text = String::new();
        // Letters and dots are taken along so that `8x` is one wrong number instead of two tokens.
        loop {
            text.push_str(self.take_while(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.'));
            let exponent = text.ends_with(['e', 'E']) && text.bytes().filter(|b| b.is_ascii_alphabetic()).count() == 1;
            match self.peek() {
                Some(c @ ('+' | '-')) if exponent => {
                    self.chars.next();
                    text.push(c);
                }
                _ => break,
            }
        }
        if text.bytes().all(|b| b.is_ascii_digit()) {
            return text
                .parse()
                .map(Tok::Int)
                .map_err(|_| Diagnostic::error(format!("the number {text} is too large")).at(self.span(start)));
        }
        match text.parse::<f64>() {
            Ok(v) if v.is_finite() => Ok(Tok::Float(v)),
            _ => {
                let d = Diagnostic::error(format!("`{text}` is no number")).at(self.span(start));
                Err(d.help("numbers look like 8, 0.5 or 1e-5; infinity is `inf`"))
            }
        }
    }

    fn string(&mut self) -> Result<String, Diagnostic> {
        let start = self.pos();
        self.chars.next();
        let mut out = String::new();
        loop {
            let at = self.pos();
            let Some((_, c)) = self.chars.next() else {
                let d = Diagnostic::error("a string without its closing quote").at(self.span(start));
                return Err(d.help("strings end on the line they began on; write a line break as \\n"));
            };
            match c {
                '"' => return Ok(out),
                '\\' => match self.escape() {
                    Some(c) => out.push(c),
                    None => {
                        let d = Diagnostic::error("unknown escape in a string").at(self.span(at));
                        return Err(d.help("known: \\\" \\\\ \\n \\r \\t \\u{1f600}"));
                    }
                },
                c => out.push(c),
            }
        }
    }

    /// The character that an escape stands for; the backslash is taken.
    fn escape(&mut self) -> Option<char> {
        let (_, c) = self.chars.next()?;
        match c {
            '"' | '\\' => Some(c),
            'n' => Some('\n'),
            'r' => Some('\r'),
            't' => Some('\t'),
            'u' => {
                self.chars.next_if(|&(_, c)| c == '{')?;
                let hex = self.take_while(|c| c.is_ascii_hexdigit()).to_string();
                self.chars.next_if(|&(_, c)| c == '}')?;
                u32::from_str_radix(&hex, 16).ok().and_then(char::from_u32)
            }
            _ => None,
        }
    }
}
