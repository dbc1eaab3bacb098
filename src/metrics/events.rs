//! TensorBoard's event files: records of protocol buffers, each with its checksums.
//!
//! Written by hand: the crates that do so bring image decoders, a TLS stack or the protobuf compiler, and all that a scalar
//! takes are six fields.
//!
//! ```text
//! record:  u64 length, u32 masked CRC-32C of it, the event, u32 masked CRC-32C of it; all little-endian
//! Event:   1 double wall_time | 2 int64 step | 3 string file_version | 5 Summary | 7 SessionLog
//! Summary: 1 repeated Value { 1 string tag, 2 float simple_value }         SessionLog: 1 status (1 is START)
//! ```

use std::fs::File;
use std::io::{Result, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Appends to a file of its own.
pub struct Writer {
    file: File,
}

impl Writer {
    /// A new file in `folder` for the steps after `step`; what other files hold of these is void, as TensorBoard reads it.
    pub fn create(folder: &Path, step: u64) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let (seconds, pid) = (now() as u64, std::process::id());
        let name = |i: u32| folder.join(format!("events.out.tfevents.{seconds:010}.rambac.{pid}.{i}"));
        let free = (0..).map(name).find(|p| !p.exists()).expect("BUG: there are infinitely many names");
        let mut w = Self { file: File::options().create_new(true).append(true).open(free)? };
        let mut version = vec![];
        bytes(&mut version, 3, b"brain.Event:2");
        w.event(0, &version)?;
        let mut start = vec![];
        bytes(&mut start, 7, &[1 << 3, 1]);
        w.event(step + 1, &start)?;
        Ok(w)
    }

    /// Writes values of one step.
    pub fn scalars(&mut self, step: u64, values: &[(String, f32)]) -> Result<()> {
        let mut summary = vec![];
        for (tag, x) in values {
            let mut value = vec![];
            bytes(&mut value, 1, tag.as_bytes());
            value.push(2 << 3 | 5);
            value.extend(x.to_le_bytes());
            bytes(&mut summary, 1, &value);
        }
        let mut event = vec![];
        bytes(&mut event, 5, &summary);
        self.event(step, &event)
    }

    /// Writes an event with these fields at once, so that readers never see a half.
    fn event(&mut self, step: u64, fields: &[u8]) -> Result<()> {
        let mut event = vec![1 << 3 | 1];
        event.extend(now().to_le_bytes());
        event.push(2 << 3);
        varint(&mut event, step);
        event.extend(fields);
        let length = (event.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked(&length).to_le_bytes());
        record.extend(&event);
        record.extend(masked(&event).to_le_bytes());
        self.file.write_all(&record)
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

fn masked(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn varint(out: &mut Vec<u8>, mut x: u64) {
    while x >= 0x80 {
        out.push(x as u8 | 0x80);
        x >>= 7;
    }
    out.push(x as u8);
}

/// A field that is a string or a message.
fn bytes(out: &mut Vec<u8>, field: u8, contents: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, contents.len() as u64);
    out.extend(contents);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes that TensorBoard's own writer gives for the same event, but for its time.
    #[test]
    fn records() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let dir = tempfile::tempdir().unwrap();
        let mut w = Writer::create(dir.path(), 300).unwrap();
        w.scalars(301, &[("train/loss".into(), 0.5)]).unwrap();
        let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let file = std::fs::read(path).unwrap();
        let mut rest = &file[..];
        let mut events = vec![];
        while !rest.is_empty() {
            let n = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let sum = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
            assert_eq!(sum(8), masked(&rest[..8]));
            assert_eq!(sum(12 + n), masked(&rest[12..12 + n]));
            assert_eq!(rest[12], 9, "the time comes first");
            events.push(rest[21..12 + n].to_vec());
            rest = &rest[16 + n..];
        }
        assert_eq!(events[0], [b"\x10\x00\x1a\x0d".as_slice(), b"brain.Event:2"].concat());
        assert_eq!(events[1], b"\x10\xad\x02\x3a\x02\x08\x01");
        let value = [b"\x0a\x0atrain/loss\x15".as_slice(), &0.5f32.to_le_bytes()].concat();
        assert_eq!(events[2], [b"\x10\xad\x02\x2a\x13\x0a\x11".as_slice(), &value].concat());
        assert_eq!(events.len(), 3);
    }
}
