//! Writes stubs: a header, a config struct, hooks, and the kernel that instantiates a template.
//!
//! ```text
//! #include "rms_norm.cuh"
//! using namespace rambac;
//! struct Config { using T = bf16; static constexpr int cols = 1024; };
//! extern "C" __global__ void __launch_bounds__(128, 4)
//! rms_norm_bf16_1024(const bf16* x, i64 x_stride, bf16* y, i64 y_stride, i32 rows) {
//!     after_earlier();
//!     rms_norm<Config>(x, x_stride, y, y_stride, rows);
//! }
//! ```

use super::expr::Expr;
use super::form::{Kernel, Launch, Operand, Param, TensorParam};
use rambac_ir::DType;
use std::fmt::Write;

/// The name of an element type in device code.
pub fn c_type(d: DType) -> &'static str {
    match d {
        DType::F32 => "float",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        DType::I32 => "i32",
        DType::Bool => "u8",
    }
}

/// A number in device code, exact.
pub fn c_float(v: f64) -> String {
    let v = v as f32;
    if v.is_nan() {
        return "__int_as_float(0x7fffffff)".into();
    }
    if v.is_infinite() {
        return if v > 0.0 { "__int_as_float(0x7f800000)" } else { "__int_as_float(0xff800000)" }.into();
    }
    format!("{v:?}f")
}

/// A stub in the making; see the module's comment.
pub struct Stub {
    header: &'static str,
    template: &'static str,
    tags: Vec<String>,
    config: Vec<String>,
    hooks: String,
    params: Vec<(String, String, Param)>,
    threads: usize,
    shared: usize,
    blocks_per_sm: usize,
    hashed: bool,
    early: Option<Vec<Operand>>,
}

impl Stub {
    /// A kernel of `template` in `header` (without `.cuh`) with so many threads.
    pub fn new(header: &'static str, template: &'static str, threads: usize) -> Stub {
        Stub {
            header,
            template,
            tags: vec![],
            config: vec![],
            hooks: String::new(),
            params: vec![],
            threads,
            shared: 0,
            blocks_per_sm: 1,
            hashed: false,
            early: None,
        }
    }
    /// A part of the kernel's name.
    pub fn tag(mut self, tag: impl std::fmt::Display) -> Stub {
        self.tags.push(tag.to_string());
        self
    }
    /// The template waits by itself for the kernels before it, and reads these operands before (earlier.cuh).
    pub fn early(mut self, ahead: impl IntoIterator<Item = Operand>) -> Stub {
        self.early = Some(ahead.into_iter().collect());
        self
    }
    /// `using name = …` in the config; the type is a tag too.
    pub fn element(mut self, name: &str, d: DType) -> Stub {
        self.config.push(format!("using {name} = {};", c_type(d)));
        self.tag(d)
    }
    /// `static constexpr int` in the config.
    pub fn int(mut self, name: &str, v: usize) -> Stub {
        self.config.push(format!("static constexpr int {name} = {v};"));
        self
    }
    /// `static constexpr bool` in the config.
    pub fn flag(mut self, name: &str, v: bool) -> Stub {
        self.config.push(format!("static constexpr bool {name} = {v};"));
        self
    }
    /// `static constexpr float` in the config.
    pub fn float(mut self, name: &str, v: f64) -> Stub {
        self.config.push(format!("static constexpr float {name} = {};", c_float(v)));
        self
    }
    /// Any other line of the config, such as a hook's type.
    pub fn line(mut self, text: impl Into<String>) -> Stub {
        self.config.push(text.into());
        self
    }
    /// Text before the config: hook structs.
    pub fn hook(mut self, text: &str) -> Stub {
        self.hooks.push_str(text);
        self
    }
    /// Dynamic shared memory, in bytes.
    pub fn shared(mut self, bytes: usize) -> Stub {
        self.shared = bytes;
        self
    }
    /// Blocks per multiprocessor that the choice counts on; the compiler keeps registers below what it allows.
    pub fn blocks_per_sm(mut self, blocks: usize) -> Stub {
        self.blocks_per_sm = blocks;
        self
    }
    fn param(mut self, ty: String, name: &str, p: Param) -> Stub {
        self.params.push((ty, name.into(), p));
        self
    }
    /// A pointer that is only read.
    pub fn read(self, name: &str, d: DType, at: Operand) -> Stub {
        self.param(format!("const {}*", c_type(d)), name, Param::Address(at))
    }
    /// As [`read`](Self::read), from a later element on.
    pub fn read_from(self, name: &str, d: DType, at: Operand, first: Expr) -> Stub {
        if first.as_int() == Some(0) {
            return self.read(name, d, at);
        }
        self.param(format!("const {}*", c_type(d)), name, Param::Element { at, dtype: d, first })
    }
    /// As [`write`](Self::write), from a later element on.
    pub fn write_from(self, name: &str, d: DType, at: Operand, first: Expr) -> Stub {
        if first.as_int() == Some(0) {
            return self.write(name, d, at);
        }
        self.param(format!("{}*", c_type(d)), name, Param::Element { at, dtype: d, first })
    }
    /// A pointer that is written.
    pub fn write(self, name: &str, d: DType, at: Operand) -> Stub {
        self.param(format!("{}*", c_type(d)), name, Param::Address(at))
    }
    pub fn i32(self, name: &str, v: impl Into<Expr>) -> Stub {
        self.param("i32".into(), name, Param::Int(v.into()))
    }
    pub fn i64(mut self, name: &str, v: impl Into<Expr>) -> Stub {
        self.add_i64(name, v);
        self
    }
    /// As [`i64`](Self::i64), in place.
    pub fn add_i64(&mut self, name: &str, v: impl Into<Expr>) {
        self.params.push(("i64".into(), name.into(), Param::Long(v.into())));
    }
    /// A hash of the text stands in the name, for kernels that no short name tells apart.
    pub fn hashed(mut self) -> Stub {
        self.hashed = true;
        self
    }
    /// A struct `Table` of addresses and `i64`s, by value.
    pub fn table(self, name: &str, words: Vec<Param>) -> Stub {
        let ty = format!("const __grid_constant__ Table<{}>", words.len());
        self.param(ty, name, Param::Table(words))
    }
    /// A tensor map, by value.
    pub fn tensor(self, name: &str, t: TensorParam) -> Stub {
        self.param("const __grid_constant__ TensorMap".into(), name, Param::Tensor(t))
    }
    pub fn f32(self, name: &str, v: f32) -> Stub {
        self.param("float".into(), name, Param::Float(v))
    }

    /// The launch over `grid`.
    pub fn launch<X, Y, Z>(self, grid: (X, Y, Z)) -> Launch
    where
        X: Into<Expr>,
        Y: Into<Expr>,
        Z: Into<Expr>,
    {
        let arguments: Vec<&str> = self.params.iter().map(|(_, n, _)| n.as_str()).collect();
        let body = format!("    {}<Config>({});\n", self.template, arguments.join(", "));
        self.launch_body(grid, body)
    }

    /// As [`launch`](Self::launch), with a body of its own in place of the template's call.
    pub fn launch_body<X, Y, Z>(self, grid: (X, Y, Z), body: String) -> Launch
    where
        X: Into<Expr>,
        Y: Into<Expr>,
        Z: Into<Expr>,
    {
        let mut head = format!("#include \"{}.cuh\"\nusing namespace rambac;\n{}", self.header, self.hooks);
        if !self.config.is_empty() {
            head += &packed("struct Config { ", "    ", &self.config, " ", " };");
        }
        let params: Vec<String> = self.params.iter().map(|(t, n, _)| format!("{t} {n}")).collect();
        let mut name = self.template.to_string();
        self.tags.iter().for_each(|t| name += &format!("_{t}"));
        if self.hashed {
            name += &format!("_{:08x}", fnv(&[&head, &params.join(","), &body]) as u32);
        }
        let mut s = head;
        let _ = writeln!(s, "extern \"C\" __global__ void __launch_bounds__({}, {})", self.threads, self.blocks_per_sm);
        s += &packed(&format!("{name}("), "    ", &params, ", ", ") {");
        if self.early.is_none() {
            s += "    after_earlier();\n";
        }
        s += &body;
        s += "}\n";
        let kernel = Kernel {
            name,
            source: s,
            threads: self.threads as u32,
            shared: self.shared as u32,
            blocks_per_sm: self.blocks_per_sm as u32,
        };
        let (x, y, z) = grid;
        Launch {
            kernel,
            grid: [x.into(), y.into(), z.into()],
            params: self.params.into_iter().map(|(_, _, p)| p).collect(),
            ahead: self.early.unwrap_or_default(),
        }
    }
}

/// Fowler, Noll and Vo's hash (FNV-1a, 64 bits), the same on every machine.
fn fnv(parts: &[&str]) -> u64 {
    parts
        .iter()
        .flat_map(|p| p.bytes())
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ b as u64).wrapping_mul(0x100_0000_01b3))
}

/// Parts on as few lines of at most 120 columns as they fit.
pub fn packed(head: &str, indent: &str, parts: &[String], between: &str, tail: &str) -> String {
    let (mut out, mut line) = (String::new(), head.to_string());
    for (i, p) in parts.iter().enumerate() {
        let last = i + 1 == parts.len();
        let add = format!("{p}{}", if last { tail } else { between });
        if line.len() + add.trim_end().len() > 120 && line.trim() != "" {
            out += line.trim_end();
            out.push('\n');
            line = indent.to_string();
        }
        line += &add;
    }
    if parts.is_empty() {
        line += tail;
    }
    out += line.trim_end();
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stub_reads_like_a_kernel() {
        let l = Stub::new("rms_norm", "rms_norm", 128)
            .element("T", DType::BF16)
            .int("cols", 1024)
            .tag(1024)
            .float("eps", 1e-5)
            .blocks_per_sm(4)
            .read("x", DType::BF16, Operand::Input(0))
            .i64("x_stride", 1024)
            .write("y", DType::BF16, Operand::Output(0))
            .launch((Expr::int(7), 1, 1));
        let want = "#include \"rms_norm.cuh\"\n\
                    using namespace rambac;\n\
                    struct Config { using T = bf16; static constexpr int cols = 1024; static constexpr float eps = 1e-5f; };\n\
                    extern \"C\" __global__ void __launch_bounds__(128, 4)\n\
                    rms_norm_bf16_1024(const bf16* x, i64 x_stride, bf16* y) {\n    \
                    after_earlier();\n    \
                    rms_norm<Config>(x, x_stride, y);\n\
                    }\n";
        assert_eq!(l.kernel.source, want);
        assert_eq!(l.params[1], Param::Long(Expr::int(1024)));
    }

    #[test]
    fn numbers_are_exact() {
        assert_eq!([1.0, 0.1, 1e30, -2.5].map(c_float), ["1.0f", "0.1f", "1e30f", "-2.5f"]);
        assert_eq!(c_float(f64::NEG_INFINITY), "__int_as_float(0xff800000)");
    }
}
