//! A kernel and the functions it calls → [`Program`].  Everything unknown is reported, with its line, before anything
//! runs; after this the executor meets no instruction it can't do.
//!
//! `alu` and `compare`: arithmetic; `control`: jumps, calls, barriers, warp exchange; `memory`: loads, stores, atomics;
//! `tensor`: matrices and asynchronous copies; `operand`: names → slots.
//!
//! Deliberately absent: recursion (frames are laid out once), indirect calls, textures, 128-bit registers.

mod alu;
mod compare;
mod control;
mod memory;
mod mods;
mod operand;
mod tensor;

use crate::error::{Error, PtxError};
use crate::isa::{Class, Inst, Op, Param, Place, Pred, Program, Slot, Special, Wgmma};
use crate::parse::ast::{self, Module, Operand, Source, Space, Stmt};
use mods::Mods;
use std::collections::{HashMap, HashSet};

type Result<T> = std::result::Result<T, String>;

/// Where a module's variables lie.
pub struct Image {
    /// Addresses of variables in global memory.
    pub globals: HashMap<String, u64>,
    /// Offsets of variables in constant memory.
    pub constants: HashMap<String, u64>,
}

#[derive(Clone)]
enum Name {
    Reg(Slot),
    Pred(u16),
    Var(Space, u64),
    /// Memory whose size the launch decides.
    Dynamic,
}

struct Frame {
    params: Vec<(u32, u32)>,
    returns: Vec<(u32, u32)>,
}

struct Decoder<'a> {
    module: &'a Module,
    image: &'a Image,
    scopes: Vec<HashMap<String, Name>>,
    code: Vec<Inst>,
    places: Vec<Place>,
    mnemonics: Vec<String>,
    classes: Vec<Class>,
    /// Registers that instructions name, and those of the one at hand; whether they are written.
    names: Vec<Box<[(Slot, bool)]>>,
    named: Vec<(Slot, bool)>,
    n_slots: u32,
    n_preds: u32,
    constants: HashMap<u64, Slot>,
    specials: HashMap<Special, Slot>,
    /// Slots that hold an address in dynamic shared memory: (slot, offset).
    dynamic: Vec<(Slot, i64)>,
    /// Slots that hold another address in shared memory.
    shared_addresses: HashMap<u64, Slot>,
    /// Bytes of each declared register.
    widths: HashMap<Slot, u8>,
    shared: Vec<(String, u32, u32)>,
    shared_at: u32,
    shared_known: HashMap<String, u64>,
    local: Vec<(String, u32, u32)>,
    local_at: u32,
    frames: HashMap<String, Frame>,
    /// Functions in order of their first call.
    pending: Vec<String>,
    calls: Vec<(usize, String)>,
    edges: Vec<(String, String, u32)>,
    targets: HashMap<String, Vec<String>>,
    /// (instruction, labels, line, scopes).
    jumps: Vec<(usize, Vec<String>, u32, Vec<u32>)>,
    /// By the scope they stand in.
    labels: HashMap<(u32, String), u32>,
    /// Numbers of the open scopes, and how many there were.
    open: Vec<u32>,
    n_scopes: u32,
    function: String,
    carry: u16,
    grain_global: u32,
    grain_shared: u32,
    errors: Vec<PtxError>,
}

/// Makes a kernel ready to run.
pub fn decode(module: &Module, kernel: &str, image: &Image) -> std::result::Result<Program, Error> {
    let Some(f) = module.functions.iter().find(|f| f.entry && f.name == kernel) else {
        let have = module.functions.iter().filter(|f| f.entry).map(|f| f.name.clone()).collect();
        return Err(Error::NoKernel { name: kernel.into(), have });
    };
    let mut d = Decoder {
        module,
        image,
        scopes: vec![HashMap::new()],
        code: vec![],
        places: vec![],
        mnemonics: vec![],
        classes: vec![],
        names: vec![],
        named: vec![],
        n_slots: 1,
        n_preds: 2,
        constants: HashMap::new(),
        specials: HashMap::new(),
        dynamic: vec![],
        shared_addresses: HashMap::new(),
        widths: HashMap::new(),
        shared: vec![],
        shared_at: 0,
        shared_known: HashMap::new(),
        local: vec![],
        local_at: 0,
        frames: HashMap::new(),
        pending: vec![],
        calls: vec![],
        edges: vec![],
        targets: HashMap::new(),
        jumps: vec![],
        labels: HashMap::new(),
        open: vec![0],
        n_scopes: 0,
        function: String::new(),
        carry: 1,
        grain_global: 4,
        grain_shared: 4,
        errors: vec![],
    };
    let mut params = vec![];
    let mut at = 0usize;
    for p in &f.params {
        at = at.next_multiple_of(p.align.max(1) as usize);
        params.push(Param { name: p.name.clone(), offset: at, bytes: p.bytes as usize, ty: p.ty });
        d.scopes[0].insert(p.name.clone(), Name::Var(Space::Param, at as u64));
        at += p.bytes as usize;
    }
    d.function(f);
    let mut entries = HashMap::new();
    let mut next = 0;
    while next < d.pending.len() {
        let name = d.pending[next].clone();
        next += 1;
        entries.insert(name.clone(), d.code.len() as u32);
        let Some(g) = module.functions.iter().find(|g| g.name == name && g.has_body) else {
            d.errors.push(PtxError::new(f.line, format!("function {name} is called but has no body in this module")));
            continue;
        };
        d.scopes = vec![HashMap::new()];
        let frame = &d.frames[&name];
        let (ps, rs) = (frame.params.clone(), frame.returns.clone());
        for (v, (at, _)) in g.params.iter().zip(ps).chain(g.returns.iter().zip(rs)) {
            d.scopes[0].insert(v.name.clone(), Name::Var(Space::Local, u64::from(at)));
        }
        d.function(g);
    }
    for (at, name) in &d.calls {
        if let (Op::Call(call), Some(&entry)) = (&mut d.code[*at].op, entries.get(name)) {
            call.target = entry;
        }
    }
    d.refuse_recursion();
    d.finish(f, params, at)
}

impl Decoder<'_> {
    /// A cycle of calls would need frames that are made while running.
    fn refuse_recursion(&mut self) {
        let names: Vec<String> = self.frames.keys().cloned().collect();
        for start in names {
            let mut reached = vec![start.clone()];
            let mut i = 0;
            while i < reached.len() {
                for (from, to, line) in &self.edges {
                    if *from == reached[i] {
                        if *to == start {
                            let text = format!("{start} calls itself: recursion is not known to the simulator");
                            self.errors.push(PtxError::new(*line, text));
                            return;
                        }
                        if !reached.contains(to) {
                            reached.push(to.clone());
                        }
                    }
                }
                i += 1;
            }
        }
    }

    fn finish(
        mut self,
        f: &ast::Function,
        params: Vec<Param>,
        param_bytes: usize,
    ) -> std::result::Result<Program, Error> {
        if !self.errors.is_empty() {
            self.errors.sort_by_key(|e| e.line);
            return Err(Error::Ptx(self.errors));
        }
        let align = self.module.vars.iter().filter(|v| v.space == Space::Shared && v.bytes == 0).map(|v| v.align).max();
        let shared_bytes = self.shared_at.next_multiple_of(align.unwrap_or(16).max(16) as u32);
        let mut constants: Vec<(Slot, u64)> = self.constants.iter().map(|(&v, &s)| (s, v)).collect();
        constants.extend(self.dynamic.iter().map(|&(s, o)| (s, (i64::from(shared_bytes) + o) as u64)));
        constants.extend(self.shared_addresses.iter().map(|(&at, &s)| (s, at)));
        constants.sort_unstable();
        let mut shared_slots: Vec<Slot> =
            self.dynamic.iter().map(|d| d.0).chain(self.shared_addresses.values().copied()).collect();
        shared_slots.sort_unstable();
        let mut specials: Vec<(Slot, Special)> = self.specials.iter().map(|(&v, &s)| (s, v)).collect();
        specials.sort_unstable_by_key(|s| s.0);
        let touches = touches(&self.code, &self.names);
        Ok(Program {
            name: f.name.clone(),
            code: self.code,
            places: self.places,
            mnemonics: self.mnemonics,
            classes: self.classes,
            touches,
            n_slots: self.n_slots as usize,
            n_preds: self.n_preds as usize,
            constants,
            specials,
            shared_slots,
            params,
            param_bytes,
            shared_vars: self.shared,
            shared_bytes,
            local_bytes: self.local_at,
            local_vars: self.local,
            grain_global: self.grain_global,
            grain_shared: self.grain_shared,
            required_block: f.required_block,
            max_threads: f.max_threads,
            cluster: f.cluster,
        })
    }

    fn new_slot(&mut self) -> Slot {
        self.n_slots += 1;
        self.n_slots - 1
    }

    fn new_pred(&mut self, line: u32) -> u16 {
        if self.n_preds >= u32::from(u16::MAX) {
            self.errors.push(PtxError::new(line, "more than 65535 predicates"));
            return 1;
        }
        self.n_preds += 1;
        (self.n_preds - 1) as u16
    }

    /// Room in every thread's local memory.
    fn new_local(&mut self, bytes: u64, align: u64) -> u32 {
        let at = self.local_at.next_multiple_of(align.max(1) as u32);
        self.local_at = at.saturating_add(bytes as u32);
        at
    }

    fn new_shared(&mut self, name: &str, bytes: u64, align: u64) -> u32 {
        let at = self.shared_at.next_multiple_of(align.max(1) as u32);
        self.shared_at = at.saturating_add(bytes as u32);
        self.shared.push((name.to_string(), at, bytes as u32));
        at
    }

    fn function(&mut self, f: &ast::Function) {
        self.function = f.name.clone();
        self.labels.clear();
        self.targets.clear();
        self.jumps.clear();
        self.scopes.push(HashMap::new());
        self.open = vec![0];
        self.carry = self.new_pred(f.line);
        let mut source: Option<Source> = None;
        let mut last_label = String::new();
        for stmt in &f.body {
            match stmt {
                Stmt::Open => {
                    self.scopes.push(HashMap::new());
                    self.n_scopes += 1;
                    self.open.push(self.n_scopes);
                }
                Stmt::Close => {
                    self.scopes.pop();
                    self.open.pop();
                }
                Stmt::Label(name, line) => {
                    let scope = self.open.last().copied().unwrap_or(0);
                    if self.labels.insert((scope, name.clone()), self.code.len() as u32).is_some() {
                        self.errors.push(PtxError::new(*line, format!("label {name} stands twice")));
                    }
                    last_label.clone_from(name);
                }
                Stmt::Targets(all) => {
                    self.targets.insert(last_label.clone(), all.clone());
                }
                Stmt::Loc(s) => source = (s.line != 0).then_some(*s),
                Stmt::Reg { ty, names } => {
                    for (name, count) in names {
                        let all: Vec<String> = if *count == 0 {
                            vec![name.clone()]
                        } else {
                            (0..*count).map(|i| format!("{name}{i}")).collect()
                        };
                        for n in all {
                            let what = match ty {
                                crate::isa::Ty::Pred => Name::Pred(self.new_pred(f.line)),
                                crate::isa::Ty::B128 => {
                                    continue; // an error where one is used
                                }
                                _ => {
                                    let slot = self.new_slot();
                                    self.widths.insert(slot, ty.bytes() as u8);
                                    Name::Reg(slot)
                                }
                            };
                            self.declare(n, what);
                        }
                    }
                }
                Stmt::Var(v) => {
                    let name = match v.space {
                        Space::Shared => {
                            Name::Var(Space::Shared, u64::from(self.new_shared(&v.name, v.bytes, v.align)))
                        }
                        Space::Local | Space::Param => {
                            let at = self.new_local(v.bytes, v.align);
                            if v.space == Space::Local {
                                self.local.push((v.name.clone(), at, v.bytes as u32));
                            }
                            Name::Var(Space::Local, u64::from(at))
                        }
                        _ => {
                            let text = format!("{} can only be declared outside functions", v.name);
                            self.errors.push(PtxError::new(v.line, text));
                            continue;
                        }
                    };
                    self.declare(v.name.clone(), name);
                }
                Stmt::Inst(i) => self.instruction(i, source),
            }
        }
        self.scopes.pop();
        // A body may end without `ret`.
        let line = f.body.iter().rev().find_map(|s| if let Stmt::Inst(i) = s { Some(i.line) } else { None });
        self.push(
            Pred::TRUE,
            Op::Ret,
            Place { line: line.unwrap_or(f.line), source: None },
            "ret".into(),
            Class::Control,
        );
        for (at, names, line, scopes) in std::mem::take(&mut self.jumps) {
            let mut found = vec![];
            for name in &names {
                // The innermost label of that name.
                match scopes.iter().rev().find_map(|&s| self.labels.get(&(s, name.clone()))) {
                    Some(&pc) => found.push(pc),
                    None => self.errors.push(PtxError::new(line, format!("there is no label {name} in {}", f.name))),
                }
            }
            match &mut self.code[at].op {
                Op::Bra { target } => *target = found.first().copied().unwrap_or(0),
                Op::Brx { targets, .. } => *targets = found.into(),
                _ => {}
            }
        }
    }

    fn declare(&mut self, name: String, what: Name) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name, what);
        }
    }

    fn push(&mut self, guard: Pred, op: Op, place: Place, mnemonic: String, class: Class) {
        self.code.push(Inst { guard, op });
        self.places.push(place);
        self.mnemonics.push(mnemonic);
        self.classes.push(class);
        self.names.push(std::mem::take(&mut self.named).into());
    }

    fn instruction(&mut self, i: &ast::Inst, source: Option<Source>) {
        let place = Place { line: i.line, source };
        let guard = match &i.guard {
            None => Ok(Pred::TRUE),
            Some((name, negated)) => {
                self.predicate(&Operand::Name(name.clone())).map(|p| Pred { negated: *negated, ..p })
            }
        };
        let before = self.code.len();
        self.named.clear();
        let decoded = guard.and_then(|guard| {
            let (op, class) = self.decode_one(i, guard, place)?;
            Ok((guard, op, class))
        });
        match decoded {
            Ok((guard, op, class)) => self.push(guard, op, place, i.name(), class),
            Err(message) => {
                self.code.truncate(before);
                self.places.truncate(before);
                self.mnemonics.truncate(before);
                self.classes.truncate(before);
                self.names.truncate(before);
                self.errors.push(PtxError::new(i.line, format!("{}: {message}", i.name())));
            }
        }
    }

    fn decode_one(&mut self, i: &ast::Inst, guard: Pred, place: Place) -> Result<(Op, Class)> {
        let mut m = Mods::new(&i.parts[1..]);
        let x = &i.operands[..];
        let name = i.parts[0].as_str();
        let done = match name {
            "ld" | "ldu" | "st" | "atom" | "red" | "cvta" | "isspacep" | "prefetch" | "prefetchu" | "applypriority"
            | "discard" | "createpolicy" => self.memory(name, &mut m, x)?,
            "bra" | "brx" | "call" | "ret" | "exit" | "trap" | "brkpt" | "bar" | "barrier" | "membar" | "fence"
            | "shfl" | "vote" | "match" | "redux" | "activemask" | "elect" | "nanosleep" | "griddepcontrol"
            | "setmaxnreg" | "pmevent" => self.control(name, &mut m, x, i.line)?,
            "ldmatrix" | "stmatrix" | "movmatrix" | "mma" | "cp" | "mbarrier" | "mapa" | "getctarank" | "wgmma" => {
                self.tensor(name, &mut m, x)?
            }
            _ => self.arithmetic(name, &mut m, x, guard, place, i)?,
        };
        match m.rest() {
            None => Ok(done),
            Some(rest) => Err(format!("\".{rest}\" is not known here")),
        }
    }
}

/// What [`Program::touches`] says.
fn touches(code: &[Inst], names: &[Box<[(Slot, bool)]>]) -> Vec<Box<[(Slot, bool)]>> {
    let of_products: HashSet<Slot> = code.iter().flat_map(|i| i.op.product()).flat_map(Wgmma::registers).collect();
    if of_products.is_empty() {
        return vec![];
    }
    let of = |i: &Inst, names: &[(Slot, bool)]| match i.op.product() {
        Some(_) => [].into(),
        None => names.iter().copied().filter(|r| of_products.contains(&r.0)).collect(),
    };
    code.iter().zip(names).map(|(i, names)| of(i, names)).collect()
}

/// Exactly `N` operands.
fn exactly<const N: usize>(x: &[Operand]) -> Result<&[Operand; N]> {
    x.try_into().map_err(|_| format!("{N} operands are expected, {} came", x.len()))
}
