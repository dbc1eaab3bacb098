//! Pages that hold all that they show: no other file, no network.

use serde_json::Value as Json;

/// Where a page's data goes.
const PLACE: &str = "/*DATA*/null";

/// `template` with `data` in its place, so that nothing in it can end the script.
pub fn filled(template: &str, data: &Json) -> String {
    let text = data.to_string().replace('<', "\\u003c").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029");
    template.replacen(PLACE, &text, 1)
}

/// `text` for HTML.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Base 64 (RFC 4648), as `atob` reads it.
pub fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for part in bytes.chunks(3) {
        let at = |i: usize| u32::from(part.get(i).copied().unwrap_or(0));
        let n = at(0) << 16 | at(1) << 8 | at(2);
        for i in 0..4 {
            let letter = LETTERS[(n >> (18 - 6 * i)) as usize & 63];
            out.push(if i > part.len() { '=' } else { letter.into() });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_as_in_the_rfc() {
        let of = ["", "f", "fo", "foo", "foob", "fooba", "foobar"].map(|s| base64(s.as_bytes()));
        assert_eq!(of, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"]);
    }

    #[test]
    fn data_cannot_leave_its_script() {
        let page = filled("<script>const d = /*DATA*/null;</script>", &serde_json::json!({ "x": "</script><b>" }));
        assert_eq!(page.matches("</script>").count(), 1);
        assert!(page.contains("\\u003c/script>"), "{page}");
    }
}
