//! PNG of an SVG, with fonts of our own: a machine without any draws the same letters.

use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree};
use std::sync::Arc;

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub enum RasterError {
    #[error("BUG: the SVG is malformed: {0}")]
    Svg(#[from] resvg::usvg::Error),
    #[error("a picture of {width} x {height} pixels is more than can be drawn at once; write it as SVG")]
    Size { width: u32, height: u32 },
    #[error("the picture cannot be packed as PNG: {0}")]
    Png(String),
}

/// Pixels of a picture at most: four bytes each lie in memory.
const LARGEST: u64 = 1 << 28;

/// The PNG of `svg`, `scale` times its size, or as much as fits.
///
/// # Errors
/// See [`RasterError`].
pub fn png(svg: &str, scale: f32) -> Result<Vec<u8>, RasterError> {
    let mut options = Options { font_family: "Ubuntu".into(), ..Options::default() };
    let fonts = Arc::make_mut(&mut options.fontdb);
    fonts.load_font_data(epaint_default_fonts::UBUNTU_LIGHT.to_vec());
    fonts.load_font_data(epaint_default_fonts::HACK_REGULAR.to_vec());
    // Unknown families fall back to the serif one.
    fonts.set_serif_family("Ubuntu");
    fonts.set_sans_serif_family("Ubuntu");
    fonts.set_monospace_family("Hack");
    let tree = Tree::from_str(svg, &options)?;
    let (w, h) = (tree.size().width(), tree.size().height());
    // No side of more than 32k: viewers refuse them.
    let scale = scale.min(32_000.0 / w.max(h)).min((LARGEST as f32 / (w * h)).sqrt());
    let (width, height) = ((w * scale).ceil() as u32, (h * scale).ceil() as u32);
    let mut pixels = Pixmap::new(width.max(1), height.max(1)).ok_or(RasterError::Size { width, height })?;
    resvg::render(&tree, Transform::from_scale(scale, scale), &mut pixels.as_mut());
    pixels.encode_png().map_err(|e| RasterError::Png(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bright(svg: &str) -> usize {
        let png = png(svg, 1.0).unwrap();
        let p = Pixmap::decode_png(&png).unwrap();
        p.pixels().iter().filter(|p| p.red() < 128 && p.alpha() > 128).count()
    }

    /// Letters are drawn without any font of the machine.
    #[test]
    fn letters() {
        let svg = |text: &str, family: &str| {
            format!(
                "<svg xmlns='http://www.w3.org/2000/svg' width='200' height='40'>\
                 <text x='5' y='25' font-size='20' font-family='{family}'>{text}</text></svg>"
            )
        };
        for family in ["sans-serif", "monospace", "no such font"] {
            let (few, many) = (bright(&svg("i", family)), bright(&svg("iWWWW→é", family)));
            assert!(few > 0 && many > 4 * few, "{family}: {few}, {many}");
        }
    }

    #[test]
    fn sizes() {
        let svg = |w: u32, h: u32| format!("<svg xmlns='http://www.w3.org/2000/svg' width='{w}' height='{h}'/>");
        let of = |w, h| Pixmap::decode_png(&png(&svg(w, h), 2.0).unwrap()).map(|p| (p.width(), p.height())).unwrap();
        assert_eq!(of(10, 20), (20, 40));
        assert_eq!(of(100_000, 10).0, 32_000);
        assert!(png("<svg", 1.0).unwrap_err().to_string().contains("malformed"));
    }
}
