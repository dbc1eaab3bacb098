//! Inference on a device: the same programs, states and chunks as on this machine's cores, on the simulator, without findings.

use crate::harness::Case;
use crate::rig::{NOT_HERE, Rig};
use crate::support::{pool, session_graphs};
use rambac_codegen::cuda::{Target, emit};
use rambac_driver::testing::{Fault, Faulty, INJECTED, Late, Seen};
use rambac_models::{Attention, Config, InitRule, ModelType, init_tensor, preset};
use rambac_passes::optimise;
use rambac_runtime::chunk_store::Precision;
use rambac_runtime::gpu::{Device, Machine, Placement, archs};
use rambac_runtime::session::{DeviceMemory, Segment};
use rambac_runtime::{Session, SessionError, SessionOptions, Store, Tensor, Tier};
use rambac_simulator::Options as Schedule;
use rambac_simulator::device::Simulator;
use std::sync::Arc;

pub const ALL: &[Case] = &[
    ("tiny_session_decodes_as_the_cpu", ramba),
    ("mamba2_session_decodes_as_the_cpu", mamba2),
    ("session_with_few_slots_gathers_what_is_chosen", few_slots),
    ("sessions_of_unlike_lengths_decode_together", together),
    ("session_in_a_file_goes_on", file),
    ("tokens_are_decoded_by_a_record", recorded),
    ("sessions_of_attention_variants", variants),
    ("between_choices_tokens_are_decoded_by_records", between),
    ("prompts_of_several_sequences_are_replayed", replayed),
    ("landmarks_beyond_the_limit_come_in_parts", in_parts),
    ("sessions_in_parts_in_turns", in_parts_in_turns),
    ("faults_while_chunks_are_gathered", faults),
];

fn params(c: &Config) -> Store {
    let mut store = Store::default();
    for s in c.parameters_with(InitRule::FanIn) {
        store.insert(s.name.clone(), Tensor::f32(&s.shape, init_tensor(&s, 7)));
    }
    store
}

fn tiny() -> Result<Config, String> {
    preset("tiny").map_err(|e| e.to_string())
}

/// As few layers of every kind as there can be.
fn small() -> Result<Config, String> {
    Ok(Config { num_lower_layers: 1, num_upper_layers: 1, num_upper_groups: 1, num_mamba_per_gca: 1, ..tiny()? })
}

fn options(sequences: usize, precision: Precision) -> SessionOptions {
    SessionOptions { sequences, precision, ..SessionOptions::default() }
}

fn on_device(rig: &Rig, c: &Config, o: &SessionOptions, limit: Option<usize>) -> Result<Session, SessionError> {
    let schedule = Schedule { seed: 5, lazy: true, ..Schedule::default() };
    let device: Box<dyn Device> = rig.device(schedule).expect("the device was there when the tests began");
    on(rig, device, Placement::Apart, c, o, limit)
}

fn on(
    rig: &Rig,
    device: Box<dyn Device>,
    placement: Placement,
    c: &Config,
    o: &SessionOptions,
    limit: Option<usize>,
) -> Result<Session, SessionError> {
    let mut machine = Machine::new(device, placement);
    let arch = *archs(machine.device().capability()).first().expect("the device runs code of some architecture");
    let graphs = session_graphs(c).map(|g| optimise(g, &o.passes));
    let parts = Session::device_programs(&graphs, o.precision).map(|p| {
        let gpu = Arc::new(emit(p.clone(), Target::of(arch)).expect("a model's parts run on GPUs"));
        let code = rig.compile(&gpu.kernels, &gpu.target).expect("its kernels compile");
        machine.load(gpu, &code).expect("the simulator takes them")
    });
    Session::on_device(machine, parts, params(c), pool(), o, DeviceMemory { limit, segment: 64 })
}

fn ids(n: usize, seed: usize) -> Vec<i32> {
    (0..n).map(|i| ((i * i * 31 + i * 7 + seed * 101) % 251) as i32).collect()
}

fn text<T>(r: Result<T, SessionError>) -> Result<T, String> {
    r.map_err(|e| e.to_string())
}

/// `‖a-b‖/‖b‖`
fn relative(a: &[f32], b: &[f32]) -> Result<f64, String> {
    if a.len() != b.len() {
        return Err(format!("{} numbers, {} wanted", a.len(), b.len()));
    }
    let square = |x: f64| x * x;
    let d: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    Ok((d / b.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt())
}

fn near(what: &str, a: &[f32], b: &[f32]) -> Result<f64, String> {
    let e = relative(a, b)?;
    // A key that lies between two bf16s goes either way by the last bit of its f32.
    if e <= 2e-4 { Ok(e) } else { Err(format!("{what}: {e:.1e} of the CPU's")) }
}

/// Feeds segments, then tokens one by one, to both; the largest difference of logits.
fn compare(mut a: Session, mut b: Session, segments: &[usize], tokens: usize) -> Result<(f64, Session), String> {
    let all = ids(segments.iter().sum::<usize>() + tokens, 1);
    let (mut at, mut worst) = (0, 0f64);
    for (i, &n) in segments.iter().chain(std::iter::repeat_n(&1, tokens)).enumerate() {
        let part = &all[at..at + n];
        at += n;
        if i == 1 && segments.len() > 2 {
            // Skimmed rows become memory too.
            text(a.skim(0, part))?;
            text(b.skim(0, part))?;
            continue;
        }
        let (x, y) = (text(a.feed(0, part))?, text(b.feed(0, part))?);
        worst = worst.max(near(&format!("hidden rows up to token {at}"), &x.hidden, &y.hidden)?);
        let (x, y) = (last(&x, n), last(&y, n));
        worst = worst.max(near(&format!("logits of token {at}"), &text(a.logits(x))?, &text(b.logits(y))?)?);
    }
    Ok((worst, a))
}

fn last(s: &Segment, rows: usize) -> &[f32] {
    &s.hidden[s.hidden.len() / rows * (rows - 1)..]
}

fn pair(rig: &Rig, c: &Config, o: &SessionOptions, limit: Option<usize>) -> Result<(Session, Session), String> {
    let cpu = text(Session::new(&session_graphs(c), params(c), pool(), o))?;
    Ok((text(on_device(rig, c, o, limit))?, cpu))
}

fn ramba(rig: &Rig) -> Result<String, String> {
    let c = tiny()?;
    let mut said = String::new();
    for precision in [Precision::F32, Precision::Bf16] {
        let (a, b) = pair(rig, &c, &options(1, precision), None)?;
        // Chunks become whole within segments, at their end and while tokens come one by one.
        let segments = if precision == Precision::F32 { &[40, 24][..] } else { &[25, 16, 30] };
        let (worst, a) = compare(a, b, segments, 32)?;
        if precision == Precision::F32 && worst > 1e-5 {
            return Err(format!("with chunks in f32: {worst:.1e} of the CPU's"));
        }
        let r = a.residency().ok_or("a session on a device has chunks there")?;
        if r.evicted != 0 || r.resident != a.chunks(0).map_or(0, |c| c.chunks()) {
            return Err(format!("{r:?}: every chunk has room"));
        }
        said += &format!(" {worst:.1e}");
    }
    Ok(format!(": 32 tokens, logits within{said} of the CPU's"))
}

fn mamba2(rig: &Rig) -> Result<String, String> {
    let c = Config { model_type: ModelType::Mamba2, num_upper_groups: 0, ..tiny()? };
    let (a, b) = pair(rig, &c, &options(1, Precision::F32), None)?;
    let (worst, _) = compare(a, b, &[19], 32)?;
    Ok(format!(": 32 tokens, logits within {worst:.1e} of the CPU's"))
}

/// Models with another attention, in both stacks: what they keep of a text lies on the device, and sequences go on apart.
fn variants(rig: &Rig) -> Result<String, String> {
    let mut worst = 0f64;
    for (name, transformer) in [("moba", false), ("nsa", true), ("dsa", false), ("stick_breaking", true), ("hsa", true)]
    {
        let attention = Some(Attention::named(name)?);
        // NSA's forced units count among the chosen.
        let c = Config { attention, transformer, chunk_size: 16, chunk_topk: 4, encoder_layers: 0, ..small()? };
        let (mut a, mut b) = pair(rig, &c, &options(2, Precision::F32), None)?;
        let told = |e: String| format!("{name}: {e}");
        for (seq, segments) in [&[21, 18][..], &[7]].into_iter().enumerate() {
            for &n in segments {
                let part = ids(n, seq);
                let (x, y) = (text(a.feed(seq, &part)).map_err(told)?, text(b.feed(seq, &part))?);
                worst = worst.max(near("a segment", &x.hidden, &y.hidden).map_err(told)?);
            }
        }
        let (mut x, mut y) = (vec![], vec![]);
        for i in 0..5 {
            let next = ids(2, 40 + i);
            text(a.decode_into(&next, &mut x)).map_err(told)?;
            text(b.decode_into(&next, &mut y))?;
            worst = worst.max(near(&format!("token {i}"), &x, &y).map_err(told)?);
        }
        match a.feed(0, &[1; 128]) {
            Err(SessionError::Full { room: 128, need: 172 }) => {}
            other => return Err(format!("{name}: more than there is room for: {:?}", other.map(|s| s.hidden.len()))),
        }
    }
    Ok(format!(": within {worst:.1e}"))
}

fn few_slots(rig: &Rig) -> Result<String, String> {
    let c = Config { chunk_size: 16, chunk_topk: 3, ..tiny()? };
    let o = options(1, Precision::Bf16);
    let need = match on_device(rig, &c, &o, Some(1)) {
        Err(SessionError::DeviceMemory { have: 1, need, .. }) => need,
        Err(e) => return Err(format!("a limit of one byte: {e}")),
        Ok(_) => return Err("a limit of one byte was taken".into()),
    };
    // A few slots more than one token needs.
    let (a, b) = pair(rig, &c, &o, Some(need + (12 << 10)))?;
    let (worst, mut a) = compare(a, b, &[64, 64, 64, 32], 20)?;
    let (r, chunks) = (a.residency().ok_or("chunks are on the device")?, a.chunks(0).map_or(0, |c| c.chunks()));
    if r.slots >= chunks || r.resident > r.slots || r.evicted == 0 || r.gathered <= r.evicted {
        return Err(format!("{r:?} of {chunks} chunks"));
    }
    // From the beginning again, as the first time.
    let before = a.residency();
    text(a.reset())?;
    let b = text(Session::new(&session_graphs(&c), params(&c), pool(), &o))?;
    let (_, a) = compare(a, b, &[50, 50], 3)?;
    if a.residency() == before {
        return Err("a session that is reset gathers anew".into());
    }
    Ok(format!(
        ": {} slots for {chunks} chunks, {} gathered, {} evicted, within {worst:.1e}",
        r.slots, r.gathered, r.evicted
    ))
}

fn together(rig: &Rig) -> Result<String, String> {
    let c = tiny()?;
    let lengths = [37, 5, 70];
    let o = options(lengths.len(), Precision::F32);
    let mut worst = 0f64;
    // With a slot for every chunk, and with as few as a step may need.
    let need = match on_device(rig, &c, &o, Some(1)) {
        Err(SessionError::DeviceMemory { need, .. }) => need,
        other => return Err(format!("a limit of one byte: {:?}", other.err())),
    };
    for limit in [None, Some(need)] {
        let (mut a, mut b) = pair(rig, &c, &o, limit)?;
        for (seq, &n) in lengths.iter().enumerate() {
            let prompt = ids(n, seq);
            let (x, y) = (text(a.feed(seq, &prompt))?, text(b.feed(seq, &prompt))?);
            worst = worst.max(near(&format!("prompt {seq}"), &x.hidden, &y.hidden)?);
        }
        for i in 0..14 {
            let next = ids(lengths.len(), 40 + i);
            let (x, y) = (text(a.step(&next))?, text(b.step(&next))?);
            worst = worst.max(near(&format!("step {i}"), &x.hidden, &y.hidden)?);
        }
    }
    Ok(format!(": within {worst:.1e}"))
}

/// Everything of a token is one record, on a device that does all as late as may be: the CPU's logits, and three calls a token.
fn recorded(rig: &Rig) -> Result<String, String> {
    let c = Config { chunk_size: 16, ..small()? };
    let plain = Config { model_type: ModelType::Mamba2, num_upper_groups: 0, ..small()? };
    let mut worst = 0f64;
    for (c, sequences) in [(&c, 1), (&c, 2), (&plain, 2)] {
        let o = options(sequences, Precision::F32);
        let simulator = Simulator::strict(Schedule { seed: 3, lazy: true, ..Schedule::default() });
        let device = Faulty::new(Late::new(simulator), None);
        let seen = device.seen();
        let mut a = text(on(rig, Box::new(device), Placement::Arena, c, &o, None))?;
        let mut b = text(Session::new(&session_graphs(c), params(c), pool(), &o))?;
        for seq in 0..sequences {
            let prompt = ids(13 + 20 * seq, seq);
            worst =
                worst.max(near("a prompt", &text(a.feed(seq, &prompt))?.hidden, &text(b.feed(seq, &prompt))?.hidden)?);
        }
        let (mut x, mut y) = (vec![], vec![]);
        // Chunks become whole on the way, and hidden states are asked for in between.
        for i in 0..24 {
            let next = ids(sequences, 70 + i);
            if i % 8 == 6 {
                let (x, y) = (text(a.step(&next))?, text(b.step(&next))?);
                worst = worst.max(near(&format!("step {i}"), &x.hidden, &y.hidden)?);
                if (&x.retrieved.indices, &x.retrieved.count) != (&y.retrieved.indices, &y.retrieved.count) {
                    return Err(format!("step {i}: {:?}, {:?} wanted", x.retrieved, y.retrieved));
                }
                continue;
            }
            let before = seen.calls().len();
            text(a.decode_into(&next, &mut x))?;
            text(b.decode_into(&next, &mut y))?;
            worst = worst.max(near(&format!("logits of step {i}"), &x, &y)?);
            // Neither the first ones, nor one that completes a chunk or comes after that.
            let calls = seen.calls();
            let token = if c.is_plain() { 1 } else { 2 };
            let want: Vec<&str> =
                std::iter::repeat_n("write_host", token).chain(["replay", "synchronise", "read_host"]).collect();
            if i == 22 && calls[before..] != want[..] {
                return Err(format!("a token of {sequences} sequences asks for {:?}", &calls[before..]));
            }
        }
        drop(a);
        if seen.live() + seen.records() > 0 {
            return Err(format!("{} buffers and {} records live on", seen.live(), seen.records()));
        }
    }
    Ok(format!(": within {worst:.1e}"))
}

/// A session on a device that does all as late as may be, and what is asked of that.
fn watched(rig: &Rig, c: &Config, o: &SessionOptions, limit: Option<usize>) -> Result<(Session, Seen), SessionError> {
    let simulator = Simulator::strict(Schedule { seed: 3, lazy: true, ..Schedule::default() });
    let device = Faulty::new(Late::new(simulator), None);
    let seen = device.seen();
    Ok((on(rig, Box::new(device), Placement::Arena, c, o, limit)?, seen))
}

/// What was started by itself among calls, and how many records.
fn started(calls: &[&'static str]) -> (Vec<&'static str>, usize) {
    let alone = calls.iter().filter(|c| ["alloc", "alloc_host", "launch", "product"].contains(c)).copied().collect();
    (alone, calls.iter().filter(|c| **c == "replay").count())
}

/// With fewer slots than chunks the host brings what a token chose; all before and after that is records.  And a limit of memory
/// holds.
fn between(rig: &Rig) -> Result<String, String> {
    let c = Config { chunk_size: 16, chunk_topk: 3, ..small()? };
    let plain = Config { model_type: ModelType::Mamba2, num_upper_groups: 0, ..small()? };
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let o = SessionOptions { tier: Tier::Scratch(dir.path().join("chunks")), ..options(1, Precision::F32) };
    let mut needs = vec![];
    for c in [&c, &plain] {
        match watched(rig, c, &options(1, Precision::F32), Some(1)) {
            Err(SessionError::DeviceMemory { have: 1, need, .. }) => needs.push(need),
            other => return Err(format!("a limit of one byte: {:?}", other.err())),
        }
    }
    let (mut a, seen) = text(watched(rig, &c, &o, Some(needs[0])))?;
    let mut b = text(Session::new(&session_graphs(&c), params(&c), pool(), &options(1, Precision::F32)))?;
    let mut worst = 0f64;
    for part in ids(228, 3).chunks(64) {
        let (x, y) = (text(a.feed(0, part))?, text(b.feed(0, part))?);
        worst = worst.max(near("a prompt", &x.hidden, &y.hidden)?);
    }
    let (mut x, mut y) = (vec![], vec![]);
    for i in 0..10 {
        let next = ids(1, 70 + i);
        let before = seen.calls().len();
        text(a.decode_into(&next, &mut x))?;
        text(b.decode_into(&next, &mut y))?;
        worst = worst.max(near(&format!("logits of token {i}"), &x, &y)?);
        let (alone, records) = started(&seen.calls()[before..]);
        // The lower half, the upper before and after the choice, the head.
        if i == 9 && (records != 4 || !alone.is_empty()) {
            return Err(format!("a token asks for {records} records and {alone:?}"));
        }
    }
    let r = a.residency().ok_or("chunks are on the device")?;
    if r.evicted == 0 || r.slots >= a.chunks(0).map_or(0, |c| c.chunks()) {
        return Err(format!("{r:?}: nothing had to go"));
    }
    let taken = a.device().map_or(0, |(m, _)| m.bytes());
    if taken > needs[0] {
        return Err(format!("{taken} bytes of the device were taken, {} were given", needs[0]));
    }
    drop(a);
    if seen.live() + seen.records() > 0 {
        return Err(format!("{} buffers and {} records live on", seen.live(), seen.records()));
    }
    Ok(format!(": within {worst:.1e}, {taken} of {} bytes", needs[0]))
}

/// Sequences that are prefilled in turns use the same records and the same memory.
fn replayed(rig: &Rig) -> Result<String, String> {
    let mut worst = 0f64;
    for c in [
        Config { chunk_size: 16, ..small()? },
        Config { model_type: ModelType::Mamba2, num_upper_groups: 0, ..small()? },
    ] {
        let o = options(2, Precision::F32);
        let (mut a, seen) = text(watched(rig, &c, &o, None))?;
        let mut b = text(Session::new(&session_graphs(&c), params(&c), pool(), &o))?;
        for round in 0..6 {
            let (seq, part) = (round % 2, ids(10, round));
            let before = seen.calls().len();
            let (x, y) = (text(a.feed(seq, &part))?, text(b.feed(seq, &part))?);
            worst = worst.max(near(&format!("round {round}"), &x.hidden, &y.hidden)?);
            let (alone, records) = started(&seen.calls()[before..]);
            // The last one completes no chunk.
            if round == 5 && (records == 0 || !alone.is_empty()) {
                return Err(format!("a segment asks for {records} records and {alone:?}"));
            }
        }
        let next = ids(2, 9);
        worst = worst.max(near("a token", &text(a.step(&next))?.hidden, &text(b.step(&next))?.hidden)?);
    }
    Ok(format!(": within {worst:.1e}"))
}

fn file(rig: &Rig) -> Result<String, String> {
    let c = tiny()?;
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let path = dir.path().join("store");
    let all = ids(90, 2);
    let mut whole = text(Session::new(&session_graphs(&c), params(&c), pool(), &options(1, Precision::Bf16)))?;
    text(whole.feed(0, &all[..60]))?;
    let want = text(whole.feed(0, &all[60..]))?.hidden;
    let mut first = text(on_device(
        rig,
        &c,
        &SessionOptions { tier: Tier::File(path.clone()), ..options(1, Precision::Bf16) },
        None,
    ))?;
    text(first.feed(0, &all[..60]))?;
    text(first.save())?;
    drop(first);
    let o = SessionOptions { tier: Tier::Resume(path), ..options(1, Precision::Bf16) };
    let mut again = text(on_device(rig, &c, &o, None))?;
    let worst = near("what follows", &text(again.feed(0, &all[60..]))?.hidden, &want)?;
    Ok(format!(": within {worst:.1e}"))
}

/// A text of 64 times as many chunks as a page of landmarks has, on a device that holds few of them: bit for bit what a device that
/// holds all makes of it, in the memory of a text of one page.
fn in_parts(rig: &Rig) -> Result<String, String> {
    let c = Config { chunk_size: 16, chunk_topk: 3, ..small()? };
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let least = match watched(rig, &c, &options(1, Precision::Bf16), Some(1)) {
        Err(SessionError::DeviceMemory { have: 1, need, parts }) if parts.contains("a page of landmarks") => need,
        other => return Err(format!("a limit of one byte: {:?}", other.err())),
    };
    // Pages enough that some stay and others pass, and a few tokens' slots.
    let limit = least + (150 << 10);
    // What was read before is in a file, which the CPU made: to read so much, a simulator takes long.
    let long = |tokens: usize, limit: Option<usize>| -> Result<(Vec<Segment>, usize, Session), String> {
        let path = dir.path().join(format!("{tokens} {limit:?}"));
        let o = SessionOptions { tier: Tier::File(path.clone()), ..options(1, Precision::Bf16) };
        let mut s = text(Session::new(&session_graphs(&c), params(&c), pool(), &o))?;
        ids(tokens, 3).chunks(4096).try_for_each(|part| text(s.skim(0, part)))?;
        text(s.save())?;
        drop(s);
        let o = SessionOptions { tier: Tier::Resume(path), ..o };
        let (mut a, seen) = text(watched(rig, &c, &o, limit))?;
        let mut out = vec![];
        // No more at a time than the slots allow: what is cut otherwise is rounded otherwise.
        for part in ids(20, 8).chunks(2) {
            out.push(text(a.feed(0, part))?);
        }
        Ok((out, seen.peak(), a))
    };
    let (one, many) = (126 * 16, 64 * 126 * 16);
    let short = long(one, Some(limit))?.1;
    let (got, peak, a) = long(many, Some(limit))?;
    let (want, all, _) = long(many, None)?;
    let r = a.residency().ok_or("chunks are on the device")?;
    if r.landmark_parts < 4 || r.landmark_pages < 4 {
        return Err(format!("{r:?}: landmarks come in parts"));
    }
    for (i, (x, y)) in got.iter().zip(&want).enumerate() {
        if (&x.retrieved.indices, &x.retrieved.count) != (&y.retrieved.indices, &y.retrieved.count) {
            return Err(format!("part {i}: {:?}, {:?} wanted", x.retrieved.indices, y.retrieved.indices));
        }
        if x.hidden != y.hidden || x.retrieved.weights != y.retrieved.weights {
            return Err(format!("part {i}: other bits than where all is on the device"));
        }
    }
    if peak > limit || peak as f64 > 1.1 * short as f64 || all < 2 * peak {
        return Err(format!(
            "{peak} of {limit} bytes were taken, {short} for a text of one page, {all} without a limit"
        ));
    }
    Ok(format!(
        ": {} parts, {peak} of {limit} bytes ({short} at a 64th of the text, {all} without a limit)",
        r.landmark_parts
    ))
}

/// Two sequences in turns, one with landmarks that come in parts and one whose pages stay: as where all is on the device.
fn in_parts_in_turns(rig: &Rig) -> Result<String, String> {
    let c = Config { chunk_size: 16, chunk_topk: 3, ..small()? };
    let least = match watched(rig, &c, &options(2, Precision::Bf16), Some(1)) {
        Err(SessionError::DeviceMemory { need, .. }) => need,
        other => return Err(format!("a limit of one byte: {:?}", other.err())),
    };
    let run = |limit: Option<usize>| -> Result<(Vec<Segment>, Session), String> {
        let (mut a, _) = text(watched(rig, &c, &options(2, Precision::Bf16), limit))?;
        // The short one first: its pages are the first.
        for (seq, tokens) in [(1, 64), (0, 3 * 128 * 16)] {
            ids(tokens, 3 + seq).chunks(64).try_for_each(|part| text(a.skim(seq, part)))?;
        }
        let mut out = vec![];
        for part in ids(12, 8).chunks(2) {
            for seq in [0, 1] {
                out.push(text(a.feed(seq, part))?);
            }
        }
        Ok((out, a))
    };
    let (got, a) = run(Some(least + (24 << 10)))?;
    let (want, _) = run(None)?;
    let r = a.residency().ok_or("chunks are on the device")?;
    if r.landmark_parts == 0 {
        return Err(format!("{r:?}: landmarks come in parts"));
    }
    for (i, (x, y)) in got.iter().zip(&want).enumerate() {
        if x.hidden != y.hidden
            || x.retrieved.indices != y.retrieved.indices
            || x.retrieved.weights != y.retrieved.weights
        {
            return Err(format!("turn {i} is other than where all is on the device"));
        }
    }
    Ok(format!(": {} parts", r.landmark_parts))
}

/// A store that is cut under a session, and a device of which every call fails once while it chooses, brings and attends: an error
/// each time, nothing is left, and nothing panics.
fn faults(rig: &Rig) -> Result<String, String> {
    if rig.cuda.is_some() {
        return Err(format!("{NOT_HERE} injected faults: they are for the simulator"));
    }
    let c = Config { chunk_size: 16, chunk_topk: 1, ..small()? };
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let o = options(1, Precision::F32);
    let need = match watched(rig, &c, &o, Some(1)) {
        Err(SessionError::DeviceMemory { need, .. }) => need,
        other => return Err(format!("a limit of one byte: {:?}", other.err())),
    };
    let prompt = ids(56, 3);
    let path = dir.path().join("cut");
    let in_file = SessionOptions { tier: Tier::File(path.clone()), ..o.clone() };
    let mut a = text(watched(rig, &c, &in_file, Some(need)))?.0;
    text(a.feed(0, &prompt))?;
    let file = std::fs::OpenOptions::new().write(true).open(&path).map_err(|e| e.to_string())?;
    file.set_len(4096).map_err(|e| e.to_string())?;
    // Not as many as complete a chunk, which would be written.
    match (0..7).find_map(|token| a.step(&[token]).err()) {
        Some(SessionError::Store(e)) if e.to_string().contains("read") => {}
        other => return Err(format!("a store that was cut: {other:?}")),
    }
    drop(a);
    // One token behind the prompt, call by call: one that chooses what is not there.
    type Tried = (std::ops::Range<usize>, Seen, Result<Segment, SessionError>, u64);
    let run = |token: i32, fails| -> Result<Tried, String> {
        let simulator = Simulator::new(Schedule { races: false, ..Schedule::default() });
        let device = Faulty::new(Late::new(simulator), fails);
        let seen = device.seen();
        let mut a = text(on(rig, Box::new(device), Placement::Arena, &c, &o, Some(need)))?;
        text(a.feed(0, &prompt))?;
        let gathered = |a: &Session| a.residency().map_or(0, |r| r.gathered);
        let (before, had) = (seen.calls().len(), gathered(&a));
        let out = a.step(&[token]);
        let brought = gathered(&a) - had;
        let after = seen.calls().len();
        drop(a);
        Ok((before..after, seen, out, brought))
    };
    let token = (0..40).find(|&t| run(t, None).is_ok_and(|r| r.3 > 0)).ok_or("no token chooses what is not there")?;
    let (calls, seen, ..) = run(token, None)?;
    let all = seen.calls();
    for n in calls.clone() {
        // All of a prompt is run for each: the kinds of faults take turns.
        let fault = [Fault::Once, Fault::Lost][n % 2];
        let at = format!("call {n} ({}), {fault:?}", all[n]);
        let (_, seen, out, _) = run(token, Some((n, fault)))?;
        match out {
            Err(SessionError::Gpu(e)) if e.lost() == (fault == Fault::Lost) => {
                let e = e.to_string();
                if !e.contains(INJECTED) && !e.contains("there is no memory for") {
                    return Err(format!("{at}: {e}"));
                }
            }
            other => return Err(format!("{at}: {:?}", other.map(|s| s.hidden.len()).map_err(|e| e.to_string()))),
        }
        if seen.live() + seen.records() > 0 {
            return Err(format!("{at}: {} buffers and {} records live on", seen.live(), seen.records()));
        }
    }
    Ok(format!(": {} calls", calls.len()))
}
