//! Pages in a headless Chromium: no errors in the console, and the mouse is answered.
//!
//! Without Chromium nothing here can run: every test is then counted as ignored and the reason printed.

#[cfg(unix)]
mod browser;
mod harness;
#[path = "../command/support.rs"]
#[allow(dead_code)] // what other tests need
mod support;

use std::process::ExitCode;

#[cfg(unix)]
fn main() -> ExitCode {
    harness::run(&[("attend_answers_the_mouse", cases::attend), ("report_shows_everything", cases::report)])
}

#[cfg(not(unix))]
fn main() -> ExitCode {
    harness::run(&[("pages", || Err("the browser's pipe is driven on Unix alone".into()))])
}

#[cfg(unix)]
mod cases {
    use crate::browser::Browser;
    use crate::support::succeeds;
    use std::path::Path;

    /// A run of a small model.
    fn trained(dir: &Path) -> String {
        let run = dir.join("run").display().to_string();
        let args =
            ["train", "tiny", "--len", "128", "--batch", "1", "--steps", "30", "--fan-in", "--json", "--out", &run];
        succeeds(&args);
        run
    }

    pub fn attend() -> Result<(), String> {
        let mut b = Browser::start()?;
        let dir = tempfile::tempdir().unwrap();
        let run = trained(dir.path());
        let (text, html) = (dir.path().join("text.txt"), dir.path().join("attend.html"));
        let filler = "The <quick> brown fox & friends jump over \"lazy\" dogs.\n".repeat(12);
        let whole = format!("{filler}|The passkey is: 4071562|{filler}|What is the passkey? The passkey is: ");
        std::fs::write(&text, whole).unwrap();
        let (text, out) = (text.to_str().unwrap(), html.to_str().unwrap());
        succeeds(&["attend", &run, "--text", text, "--needle", "4071562", "--html", out]);
        b.open(&html);
        assert_eq!(b.errors, Vec::<String>::new());
        let shown = |b: &mut Browser| b.eval("getComputedStyle(document.getElementById('tip')).display");
        assert_eq!(shown(&mut b), "none");
        // The first chunk, seen from the end of the text.
        b.point_at("#map", [0.001, 0.999]);
        assert_eq!(shown(&mut b), "block");
        let words = |b: &mut Browser, id: &str| {
            let text = b.eval(&format!("document.getElementById('{id}').textContent"));
            text.as_str().unwrap().to_string()
        };
        let tip = words(&mut b, "tip");
        assert!(tip.contains("→ chunk 0") && tip.contains("The <quick> brow"), "{tip}");
        let token = words(&mut b, "token");
        assert!(token.contains("What is the passkey"), "{token}");
        b.picture("attend.png");
        b.point_at("#map", [0.5, 0.01]);
        assert!(words(&mut b, "tip").contains("not whole yet"), "{}", words(&mut b, "tip"));
        b.eval("document.querySelector('#heads button:last-child').click()");
        b.eval("document.querySelector('#table tbody tr').click()");
        assert!(words(&mut b, "table").contains("needle's rank"));
        assert_eq!(b.errors, Vec::<String>::new());
        Ok(())
    }

    pub fn report() -> Result<(), String> {
        let mut b = Browser::start()?;
        let dir = tempfile::tempdir().unwrap();
        let run = trained(dir.path());
        succeeds(&["eval", "passkey", &run, "--len", "128,256", "--cases", "2", "--json"]);
        let out = dir.path().join("report.html");
        succeeds(&["report", &run, "--out", out.to_str().unwrap()]);
        b.open(&out);
        assert_eq!(b.errors, Vec::<String>::new());
        assert!(b.eval("document.querySelectorAll('svg').length").as_u64().unwrap() >= 2);
        assert_eq!(b.eval("document.documentElement.scrollWidth <= innerWidth"), true, "the page scrolls sideways");
        b.picture("report.png");
        Ok(())
    }
}
