//! Pages in a headless Chromium: they load without errors, and answer the mouse.
//!
//! The browser is driven over its debugging pipe (file descriptors 3 and 4, messages that end in a zero byte).

use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A page in a browser.
pub struct Browser {
    child: Child,
    to: File,
    from: BufReader<File>,
    next: u64,
    session: Option<String>,
    /// Errors of the page: exceptions, and what it wrote to the console as an error.
    pub errors: Vec<String>,
    _profile: tempfile::TempDir,
}

/// A pipe: its reading and its writing end.
fn pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: writes two descriptors into the array, which are then owned here alone.
    unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    }
}

impl Browser {
    /// Starts one.
    ///
    /// # Errors
    /// Why this machine has none.
    pub fn start() -> Result<Browser, String> {
        let names = ["chromium", "chromium-browser", "google-chrome"];
        let quiet = |n: &str| Command::new(n).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        let Some(name) = names.into_iter().find(|n| quiet(n).is_ok_and(|s| s.success())) else {
            return Err("there is no Chromium on this machine (Debian: apt-get install chromium)".into());
        };
        let profile = tempfile::tempdir().unwrap();
        let ((theirs, to), (from, answers)) = (pipe(), pipe());
        let mut c = Command::new(name);
        c.args(["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"])
            .args(["--disable-dev-shm-usage", "--window-size=1400,1000"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let (read, write) = (theirs.as_raw_fd(), answers.as_raw_fd());
        // SAFETY: only calls that are safe after a fork; both ends are moved out of the way first, as they may be 3 or 4.
        unsafe {
            c.pre_exec(move || {
                let (r, w) = (libc::fcntl(read, libc::F_DUPFD, 10), libc::fcntl(write, libc::F_DUPFD, 10));
                if r < 0 || w < 0 || libc::dup2(r, 3) < 0 || libc::dup2(w, 4) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = c.spawn().unwrap();
        drop((theirs, answers));
        let (to, from) = (File::from(to), BufReader::new(File::from(from)));
        Ok(Browser { child, to, from, next: 0, session: None, errors: vec![], _profile: profile })
    }

    fn read(&mut self) -> Value {
        let mut message = vec![];
        self.from.read_until(0, &mut message).unwrap();
        assert_eq!(message.pop(), Some(0), "the browser ended");
        let v: Value = serde_json::from_slice(&message).unwrap();
        let p = &v["params"];
        match v["method"].as_str() {
            Some("Runtime.exceptionThrown") => self.errors.push(p["exceptionDetails"].to_string()),
            Some("Runtime.consoleAPICalled") if p["type"] == "error" => self.errors.push(p["args"].to_string()),
            Some("Log.entryAdded") if p["entry"]["level"] == "error" => self.errors.push(p["entry"].to_string()),
            _ => {}
        }
        v
    }

    /// Calls a method and waits for its answer.
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        self.next += 1;
        let id = self.next;
        let mut message = json!({ "id": id, "method": method, "params": params });
        if let Some(s) = &self.session {
            message["sessionId"] = json!(s);
        }
        self.to.write_all(format!("{message}\0").as_bytes()).unwrap();
        loop {
            let v = self.read();
            if v["id"] == id {
                assert!(v["error"].is_null(), "{method}: {}", v["error"]);
                return v["result"].clone();
            }
        }
    }

    /// Opens a file and waits until it is loaded.
    pub fn open(&mut self, path: &Path) {
        let target = self.call("Target.createTarget", json!({ "url": "about:blank" }));
        let session = self.call("Target.attachToTarget", json!({ "targetId": target["targetId"], "flatten": true }));
        self.session = Some(session["sessionId"].as_str().unwrap().to_string());
        for domain in ["Page.enable", "Runtime.enable", "Log.enable"] {
            self.call(domain, json!({}));
        }
        self.call("Page.navigate", json!({ "url": format!("file://{}", path.display()) }));
        while self.read()["method"] != "Page.loadEventFired" {}
    }

    /// The value of an expression in the page.
    pub fn eval(&mut self, text: &str) -> Value {
        let r = self.call("Runtime.evaluate", json!({ "expression": text, "returnByValue": true }));
        assert!(r["exceptionDetails"].is_null(), "{text}: {}", r["exceptionDetails"]);
        r["result"]["value"].clone()
    }

    /// Moves the mouse to a part `0..1` of an element's width and height.
    pub fn point_at(&mut self, selector: &str, part: [f64; 2]) {
        let r = self.eval(&format!(
            "(e => {{ e.scrollIntoView(); const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; \
             }})(document.querySelector('{selector}'))"
        ));
        let of = |i: usize| r[i].as_f64().unwrap();
        let (x, y) = (of(0) + part[0] * of(2), of(1) + part[1] * of(3));
        self.call("Input.dispatchMouseEvent", json!({ "type": "mouseMoved", "x": x, "y": y }));
    }

    /// A picture of the page, kept where `RAMBAC_PICTURES` names a folder: to look at.
    pub fn picture(&mut self, name: &str) {
        let Some(dir) = std::env::var_os("RAMBAC_PICTURES") else { return };
        let r = self.call("Page.captureScreenshot", json!({ "format": "png" }));
        let text = r["data"].as_str().unwrap();
        let png = self.eval(&format!("Array.from(atob('{text}'), c => c.charCodeAt(0))"));
        let bytes: Vec<u8> = png.as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8).collect();
        std::fs::write(Path::new(&dir).join(name), bytes).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
