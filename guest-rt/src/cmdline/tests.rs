use super::*;
use proptest::prelude::*;

#[test]
fn words_values_and_quotes() {
    let c = Cmdline::parse("  quiet log=debug  name=\"a b\" \"odd word\" empty= last=1 last=2 ip=1 ip=2");
    assert!(c.has("quiet") && c.has("log") && c.has("odd word") && !c.has("debug"));
    assert_eq!(c.get("log"), Some("debug"));
    assert_eq!(c.get("quiet"), None);
    assert_eq!(c.get("name"), Some("a b"));
    assert_eq!(c.get("empty"), Some(""));
    assert_eq!(c.get("last"), Some("2"));
    assert_eq!(c.get_all("ip").collect::<Vec<_>>(), ["1", "2"]);
}

#[test]
fn numbers() {
    for (text, value) in [("12", 12), ("0x1f", 31), ("4K", 4096), ("2M", 2 << 20), ("0x1G", 1 << 30), ("0", 0)] {
        assert_eq!(number(text), Some(value), "{text}");
    }
    for text in ["", "K", "0x", "-1", "1T", "18446744073709551616", "17179869184G"] {
        assert_eq!(number(text), None, "{text}");
    }
}

#[test]
fn devices_as_linux_takes_them() {
    let c = Cmdline::parse("virtio_mmio.device=4K@0xd0000000:5 x virtio_mmio.device=512@0xfeb00e00:12:3");
    let devices: Vec<_> = c.mmio_devices().collect();
    assert_eq!(
        devices,
        [
            Ok(MmioDevice { size: 4096, base: 0xd000_0000, irq: 5 }),
            Ok(MmioDevice { size: 512, base: 0xfeb0_0e00, irq: 12 })
        ]
    );
    for bad in ["4K", "4K@1", "@1:2", "4K@:5", "4K@0x1:", "4K@0x1:99999999999"] {
        let c = Cmdline::parse(&format!("virtio_mmio.device={bad}"));
        assert_eq!(c.mmio_devices().collect::<Vec<_>>(), [Err(bad)]);
    }
}

#[test]
fn devices_are_bounded() {
    let line = "virtio_mmio.device=4K@0xd0000000:5 ".repeat(3 * MAX_DEVICES);
    assert_eq!(Cmdline::parse(&line).mmio_devices().count(), MAX_DEVICES);
}

proptest! {
    #[test]
    fn any_text_is_taken(text in "\\PC{0,200}") {
        let c = Cmdline::parse(&text);
        prop_assert_eq!(c.text(), text.as_str());
        c.mmio_devices().for_each(drop);
        let _ = c.number("a");
    }
}
