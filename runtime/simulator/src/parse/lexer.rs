//! PTX text → tokens.  Words keep their dots and double colons: `ld.global.v4.f32` and `%tid.x` are one token each.

use crate::error::PtxError;

#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    /// Names, opcodes with all their suffixes, directives.
    Word(String),
    Int(u64),
    /// Bits of an f32 constant, `0f3F800000`.
    F32(u32),
    /// Bits of an f64 constant, `0d…` or a decimal fraction.
    F64(u64),
    Text(String),
    Punct(char),
}

#[derive(Clone, Debug)]
pub struct Spanned {
    pub token: Token,
    pub line: u32,
}

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

/// All tokens of a text, comments left out.
pub fn tokens(text: &str) -> Result<Vec<Spanned>, PtxError> {
    let s = text.as_bytes();
    let (mut i, mut line) = (0, 1u32);
    let mut out = Vec::new();
    while i < s.len() {
        let c = s[i];
        let at = |k: usize| s.get(k).copied().unwrap_or(0);
        match c {
            b'\n' => {
                line += 1;
                i += 1;
            }
            b' ' | b'\t' | b'\r' | 0 => i += 1,
            b'/' if at(i + 1) == b'/' => {
                while i < s.len() && s[i] != b'\n' {
                    i += 1;
                }
            }
            b'/' if at(i + 1) == b'*' => {
                let from = line;
                i += 2;
                while i < s.len() && !(s[i] == b'*' && at(i + 1) == b'/') {
                    line += u32::from(s[i] == b'\n');
                    i += 1;
                }
                if i >= s.len() {
                    return Err(PtxError::new(from, "this comment has no end"));
                }
                i += 2;
            }
            b'"' => {
                let from = i + 1;
                i = from;
                while i < s.len() && s[i] != b'"' && s[i] != b'\n' {
                    i += if s[i] == b'\\' { 2 } else { 1 };
                }
                if at(i) != b'"' {
                    return Err(PtxError::new(line, "this text has no closing quote"));
                }
                out.push(Spanned { token: Token::Text(String::from_utf8_lossy(&s[from..i]).into_owned()), line });
                i += 1;
            }
            b'0'..=b'9' => {
                let from = i;
                let hex = matches!(at(i + 1), b'x' | b'X' | b'f' | b'F' | b'd' | b'D');
                while is_word(at(i)) && (at(i) != b'.' || !hex)
                    // `1e-5`
                    || (!hex && matches!(at(i), b'+' | b'-') && i > from && matches!(s[i - 1], b'e' | b'E'))
                {
                    i += 1;
                }
                out.push(Spanned { token: number(&text[from..i], line)?, line });
            }
            _ if is_word(c) => {
                let from = i;
                loop {
                    if is_word(at(i)) {
                        i += 1;
                    } else if at(i) == b':' && at(i + 1) == b':' {
                        i += 2;
                    } else {
                        break;
                    }
                }
                out.push(Spanned { token: Token::Word(text[from..i].to_string()), line });
            }
            b'{' | b'}' | b'[' | b']' | b'(' | b')' | b',' | b';' | b':' | b'@' | b'!' | b'+' | b'-' | b'|' | b'='
            | b'<' | b'>' | b'~' | b'*' => {
                out.push(Spanned { token: Token::Punct(c as char), line });
                i += 1;
            }
            _ => {
                let shown = text[i..].chars().next().unwrap_or('?');
                return Err(PtxError::new(line, format!("'{}' has no meaning in PTX", shown.escape_default())));
            }
        }
    }
    Ok(out)
}

fn number(word: &str, line: u32) -> Result<Token, PtxError> {
    let bad = || PtxError::new(line, format!("\"{word}\" is not a number"));
    let lower = word.to_ascii_lowercase();
    if let Some(hex) = lower.strip_prefix("0f") {
        if hex.len() == 8 {
            return u32::from_str_radix(hex, 16).map(Token::F32).map_err(|_| bad());
        }
        return Err(bad());
    }
    if let Some(hex) = lower.strip_prefix("0d") {
        if hex.len() == 16 {
            return u64::from_str_radix(hex, 16).map(Token::F64).map_err(|_| bad());
        }
        return Err(bad());
    }
    if !lower.starts_with("0x") && lower.contains(['.', 'e']) {
        return lower.parse().map(|v: f64| Token::F64(v.to_bits())).map_err(|_| bad());
    }
    let digits = lower.strip_suffix('u').unwrap_or(&lower);
    let value = match digits.as_bytes() {
        [b'0', b'x', ..] => u64::from_str_radix(&digits[2..], 16),
        [b'0', b'b', ..] => u64::from_str_radix(&digits[2..], 2),
        [b'0', _, ..] => u64::from_str_radix(&digits[1..], 8),
        _ => digits.parse(),
    };
    value.map(Token::Int).map_err(|_| bad())
}
