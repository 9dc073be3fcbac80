use std::collections::BTreeSet;
use std::io::{Cursor, Write};

use proptest::prelude::*;
use serde_json::{Value, json};
use zip::write::FileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::*;

/// A GAN of two networks, with all that a manifest can say.
fn gan() -> Value {
    let optimizer =
        json!({"kind": "adam", "learning_rate": 2e-4, "beta1": 0.5, "beta2": 0.999, "epsilon": 1e-8});
    json!({
        "format": 1,
        "torch": "2.11.0",
        "device": "cpu",
        "cpu": {"arch": "x86_64", "features": ["avx2", "avx512f"]},
        "shard_batch": 4,
        "data": {"images": {"channels": 1, "height": 28, "width": 28}, "classes": 10},
        "networks": [
            {"name": "d", "parameters": [{"name": "0.weight", "shape": [2, 3]}, {"name": "0.bias", "shape": []}],
             "buffers": [{"name": "1.running_mean", "shape": [3]}], "average": null},
            {"name": "g", "parameters": [{"name": "0.weight", "shape": [3]}], "buffers": [],
             "average": {"name": "g_ema", "half_life_samples": 10000.0}},
            {"name": "teacher", "parameters": [], "buffers": [{"name": "weight", "shape": [7]}], "average": null}
        ],
        "phases": [
            {"name": "discriminator", "graph": "discriminator", "updates": ["d"], "every": 1, "batch": "next",
             "optimizer": optimizer,
             "inputs": [{"parameter": "d.0.weight"}, {"buffer": "d.1.running_mean"}, {"parameter": "g.0.weight"},
                        {"batch": "images"}, {"batch": "classes"}, {"draw": 1}, {"draw": 0}, {"step": true}],
             "draws": [{"kind": "normal", "shape": [4, 64]}, {"kind": "bernoulli", "p": 0.9, "shape": [4]}],
             "outputs": [{"gradient": "d.0.weight"}, {"gradient": "d.0.bias"}, {"buffer": "d.1.running_mean"},
                         {"scalar": "discriminator_loss"}, {"scalar": "score"}],
             "loss": "discriminator_loss"},
            {"name": "generator", "graph": "generator", "updates": ["g"], "every": 2, "batch": "same",
             "optimizer": optimizer,
             "inputs": [{"parameter": "g.0.weight"}, {"draw": 0}, {"draw": 1}],
             "draws": [{"kind": "uniform", "low": -1.0, "high": 1.0, "shape": [4]},
                       {"kind": "integers", "low": 0, "high": 10, "shape": [4]}],
             "outputs": [{"gradient": "g.0.weight"}, {"scalar": "generator_loss"}],
             "loss": "generator_loss"}
        ],
        "sample": {"graph": "sample", "count": 64, "classes": 10,
                   "inputs": [{"parameter": "g.0.weight"}, {"draw": 0}, {"classes": true}],
                   "draws": [{"kind": "normal", "shape": [64, 64]}], "output": [64, 1, 28, 28]},
        "evaluate": {"graph": "evaluate", "inputs": [{"batch": "images"}, {"parameter": "d.0.weight"}], "draws": [],
                     "outputs": [{"scalar": "nll"}]}
    })
}

/// Members of a whole package.
fn members(manifest: &Value) -> Vec<(String, Vec<u8>)> {
    let mut members = vec![
        ("x/archive_format".to_owned(), b"pt2".to_vec()),
        ("x/ganglion/manifest.json".to_owned(), manifest.to_string().into_bytes()),
        ("x/ganglion/weights.safetensors".to_owned(), b"weights".to_vec()),
    ];
    for graph in ["discriminator", "generator", "sample", "evaluate"] {
        members.push((format!("x/data/aotinductor/{graph}/c1.wrapper.so"), graph.as_bytes().to_vec()));
        members.push((format!("x/data/aotinductor/{graph}/c1.wrapper_metadata.json"), b"{}".to_vec()));
    }
    members
}

fn archive(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, content) in members {
        let stored = FileOptions::default().compression_method(CompressionMethod::Stored);
        archive.start_file(name, stored).unwrap();
        archive.write_all(content).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

fn read(bytes: &[u8]) -> Result<Package, PackageError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.pt2");
    std::fs::write(&path, bytes).unwrap();
    Package::read(&path)
}

fn parse(manifest: &Value) -> Result<Manifest, PackageError> {
    Manifest::parse(manifest.to_string().as_bytes())
}

/// Reason for which the manifest is refused with a value changed at a JSON pointer.
fn refusal(pointer: &str, value: Value) -> String {
    let mut manifest = gan();
    *manifest.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
    parse(&manifest).map(|_| pointer.to_owned()).unwrap_err().to_string()
}

#[test]
fn a_package_gives_its_manifest_hash_weights_and_graphs() {
    let bytes = archive(&members(&gan()));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.pt2");
    std::fs::write(&path, &bytes).unwrap();
    let package = Package::read(&path).unwrap();
    assert_eq!(serde_json::to_value(&package.manifest).unwrap()["networks"], gan()["networks"]);
    assert_eq!(package.hash, blake3::hash(&bytes).to_hex().to_string());
    assert_eq!(package.weights().unwrap(), b"weights");
    assert_eq!(package.manifest.graphs().count(), 4);
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let library = package.unpack("generator", &out).unwrap();
    assert_eq!(std::fs::read(&library).unwrap(), b"generator");
    assert_eq!(library.parent(), Some(out.as_path()));
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 2);
    let other = package.unpack("other", &out).unwrap_err();
    assert_eq!(other.kind(), io::ErrorKind::InvalidData);
    // A second time the files are there already, which a fresh folder never has.
    assert_eq!(package.unpack("generator", &out).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
}

#[test]
fn files_that_are_no_packages_are_named() {
    let whole = archive(&members(&gan()));
    let torch = archive(&[("x/archive_format".to_owned(), Vec::new())]);
    let script = archive(&[("G/constants.pkl".to_owned(), Vec::new())]);
    for (bytes, named) in [
        (&b"[job]\n"[..], "a text file"),
        (b"", "an empty file"),
        (b"\x7fELF\x02", "a program or library"),
        (&[0x40, 0xff, 0, 0], "a file of an unknown kind"),
        (&torch, "a .pt2 file of torch.export without a manifest"),
        (&script, "a TorchScript module"),
        (&whole[..whole.len() / 2], "a zip file that is cut off or damaged"),
    ] {
        let refused = read(bytes).unwrap_err().to_string();
        assert!(refused.contains(named) && refused.contains("not a package; write one with"), "{refused}");
    }
    let folder = tempfile::tempdir().unwrap();
    assert!(Package::read(folder.path()).unwrap_err().to_string().contains("is a folder"));
    assert!(Package::read(Path::new("/dev/zero")).unwrap_err().to_string().contains("is no file"));
    let absent = Package::read(&folder.path().join("none.pt2")).unwrap_err().to_string();
    assert!(absent.starts_with("cannot be read: "), "{absent}");
}

#[test]
fn a_package_that_lacks_a_part_or_is_damaged_is_refused() {
    let whole = members(&gan());
    for (at, lacks) in [(2, "ganglion/weights.safetensors"), (5, "graph \"generator\"")] {
        let mut parts = whole.clone();
        parts.remove(at);
        let refused = read(&archive(&parts)).unwrap_err().to_string();
        assert!(refused.contains(lacks) && refused.contains("write it again"), "{refused}");
    }
    let mut twice = whole.clone();
    twice.push(("x/data/aotinductor/sample/c2.wrapper.so".to_owned(), Vec::new()));
    assert!(read(&archive(&twice)).unwrap_err().to_string().contains("has 2 libraries"));
    let bytes = archive(&whole);
    // One letter of the manifest, which its checksum shows.
    let at = bytes.windows(8).position(|window| window == b"\"teacher").unwrap();
    let mut damaged = bytes.clone();
    damaged[at + 1] = b'T';
    let refused = read(&damaged).unwrap_err().to_string();
    assert!(refused.contains("ganglion/manifest.json is damaged"), "{refused}");
}

/// Little-endian number at each place in the headers of the member that claims `length` bytes.
fn claim(bytes: &mut [u8], length: usize, claimed: u32) {
    let length = u32::try_from(length).unwrap().to_le_bytes();
    let places: Vec<usize> = (0..bytes.len() - 4).filter(|at| bytes[*at..*at + 4] == length).collect();
    assert_eq!(places.len(), 4, "packed and unpacked size, in both headers");
    for place in [places[1], places[3]] {
        bytes[place..place + 4].copy_from_slice(&claimed.to_le_bytes());
    }
}

#[test]
fn a_member_cannot_claim_more_than_it_holds() {
    let mut parts = members(&gan());
    let length = 123_457;
    parts.push(("x/data/other".to_owned(), vec![0; length]));
    let mut bytes = archive(&parts);
    claim(&mut bytes, length, u32::MAX - 1);
    let refused = read(&bytes).unwrap_err().to_string();
    assert!(refused.contains("claims to hold 4294"), "{refused}");
}

#[test]
fn another_format_is_named_before_its_keys_are_read() {
    let refused = parse(&json!({"format": 2, "nets": []})).unwrap_err().to_string();
    assert!(refused.contains("has the format 2, and this build reads 1"), "{refused}");
    for text in ["", "{}", "[1]", "{\"format\": 1}", "\u{1f600}"] {
        let refused = Manifest::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(refused.starts_with("its manifest cannot be read: "), "{refused}");
    }
    let mut manifest = gan();
    manifest["speed"] = json!(3);
    assert!(parse(&manifest).unwrap_err().to_string().contains("unknown field `speed`"));
}

#[test]
fn names_and_shapes_of_tensors_are_checked() {
    for (pointer, value, named) in [
        ("/networks/0/name", json!("a.b"), "\"a.b\" is not the name of a network"),
        ("/networks/0/name", json!("optimizer"), "\"optimizer\" is not the name"),
        ("/networks/0/name", json!("g"), "network or average g comes twice"),
        ("/networks/1/average/name", json!("teacher"), "network or average teacher comes twice"),
        ("/networks/1/average/half_life_samples", json!(0), "half-life of 0 samples"),
        ("/networks/0/parameters/0/name", json!("a b"), "\"d.a b\" is not the name of a tensor"),
        ("/networks/0/parameters/0/name", json!("0.bias"), "the tensor d.0.bias comes twice"),
        ("/networks/0/parameters/0/shape", json!([0]), "d.0.weight: [0] is no shape"),
        ("/networks/0/parameters/0/shape", json!([1u64 << 40, 1u64 << 40]), "is no shape"),
        ("/networks", json!([]), "it has 0 networks"),
        ("/shard_batch", json!(0), "shard_batch is 0"),
        ("/data/images/channels", json!(2), "2 channels"),
        ("/data/images/width", json!(0), "a side of 0 pixels"),
        ("/device", json!("cuda"), "device \"cuda\" needs capability and cuda"),
    ] {
        let refused = refusal(pointer, value);
        assert!(refused.contains(named), "{pointer}: {refused}");
    }
}

#[test]
fn phases_are_checked() {
    for (pointer, value, named) in [
        ("/phases", json!([]), "it has 0 phases"),
        ("/phases/1/name", json!("discriminator"), "the phase discriminator comes twice"),
        ("/phases/1/name", json!("beta1"), "a phase is named beta1, as a setting of optimizers is"),
        ("/phases/0/updates", json!([]), "(\"discriminator\"): updates no network that has parameters"),
        ("/phases/0/updates", json!(["e"]), "updates e, which is no network"),
        ("/phases/0/updates", json!(["d", "d"]), "updates d twice"),
        ("/phases/0/updates", json!(["teacher"]), "updates no network that has parameters"),
        ("/phases/1/every", json!(0), "every is 0"),
        ("/phases/0/every", json!(2), "takes the next samples, and does not run in every step"),
        ("/phases/0/batch", json!("same"), "none has read any"),
        ("/phases/1/batch", json!("old"), "unknown variant `old`"),
        ("/phases/0/optimizer/learning_rate", json!(-1.0), "its optimizer has learning_rate -1"),
        ("/phases/0/optimizer/kind", json!("lion"), "unknown variant `lion`"),
        ("/phases/0/outputs/0/gradient", json!("d.0.bias"), "returns the gradient of d.0.bias twice"),
        ("/phases/0/outputs/0/gradient", json!("g.0.weight"), "of g.0.weight, which it does not update"),
        (
            "/phases/0/outputs/0",
            json!({"scalar": "x"}),
            "it updates d.0.weight, and returns no gradient of it",
        ),
        ("/phases/0/outputs/2/buffer", json!("d.0.weight"), "d.0.weight is no buffer"),
        ("/phases/0/outputs/3/scalar", json!("score"), "returns the scalar score twice"),
        ("/phases/0/outputs/4/scalar", json!("step"), "a scalar is named step, as a fixed column is"),
        ("/phases/0/outputs/4/scalar", json!("Score"), "\"Score\" is not the name of a scalar"),
        ("/phases/0/outputs/4/scalar", json!("setting_x"), "begins as settings do"),
        ("/phases/0/outputs/4/scalar", json!("generator_loss"), "both return a scalar generator_loss"),
        ("/phases/0/loss", json!("loss"), "its loss is \"loss\", and it returns no such scalar"),
        ("/networks/2/parameters", json!([{"name": "w", "shape": [1]}]), "no phase updates teacher"),
    ] {
        let refused = refusal(pointer, value);
        assert!(refused.contains(named), "{pointer}: {refused}");
    }
    let mut manifest = gan();
    manifest["phases"][0]["batch"] = json!("none");
    manifest["phases"][0]["inputs"] = json!([]);
    manifest["phases"][1]["batch"] = json!("none");
    assert!(parse(&manifest).unwrap_err().to_string().contains("no phase reads the next samples"));
}

#[test]
fn a_phase_may_name_a_frozen_network_beside_others() {
    let mut manifest = gan();
    manifest["phases"][0]["updates"] = json!(["teacher", "d"]);
    assert!(parse(&manifest).is_ok());
}

#[test]
fn inputs_and_draws_are_checked() {
    for (pointer, value, named) in [
        ("/phases/0/inputs/0/parameter", json!("d.9"), "its input d.9 is no parameter"),
        ("/phases/0/inputs/1/buffer", json!("g.0.weight"), "its input g.0.weight is no buffer"),
        ("/phases/0/inputs/5/draw", json!(2), "it takes draw 2 of 2"),
        ("/phases/0/inputs/7/step", json!(false), "is none"),
        ("/phases/0/inputs/7", json!({"classes": true}), "takes classes to draw samples of"),
        ("/phases/0/inputs/7", json!({"time": true}), "unknown variant `time`"),
        ("/data/classes", json!(0), "it takes classes, and data.classes is 0"),
        ("/phases/1/draws/0/high", json!(-1.0), "draw 0: from -1 to -1 is no range"),
        ("/phases/1/draws/1/high", json!(0), "draw 1: from 0 to 0 is no range"),
        ("/phases/1/draws/1/low", json!(i64::MIN), "is no range"),
        ("/phases/0/draws/1/p", json!(1.5), "draw 1: 1.5 is no probability"),
        ("/phases/0/draws/0/shape", json!([-1]), "invalid value"),
        ("/sample/classes", json!(3), "draws 3 classes, and the data has 10"),
        ("/sample/inputs/0", json!({"batch": "images"}), "sample: it takes samples, and reads none"),
        ("/sample/output", json!([64, 3, 28, 28]), "returns samples of shape [64, 3, 28, 28]"),
        ("/sample/count", json!(0), "count is 0"),
        ("/evaluate/outputs", json!([]), "evaluate: it returns 0 scalars"),
        ("/evaluate/outputs/0", json!({"gradient": "d.0.weight"}), "a tensor that is no scalar"),
    ] {
        let refused = refusal(pointer, value);
        assert!(refused.contains(named), "{pointer}: {refused}");
    }
}

/// A package of other data than images.
fn of(data: &Value, part: &Value) -> Value {
    let mut manifest = gan();
    manifest["data"] = data.clone();
    manifest["phases"][0]["inputs"] = json!([{"parameter": "d.0.weight"}, {"batch": part}]);
    manifest["sample"]["classes"] = json!(0);
    manifest["sample"]["inputs"] = json!([]);
    manifest["evaluate"]["inputs"] = json!([{"batch": part}]);
    manifest
}

#[test]
fn data_are_images_or_tokens_or_arrays() {
    let tokens = json!({"tokens": {"context": 16, "vocabulary": 256}, "classes": 0});
    let array = |name: &str| json!({"name": name, "kind": "float32", "shape": [2, 3]});
    let arrays = json!({"arrays": [array("x"), {"name": "y", "kind": "int64", "shape": []}], "classes": 0});
    for (data, part) in [(&tokens, json!("tokens")), (&arrays, json!({"array": "y"}))] {
        let manifest = parse(&of(data, &part)).unwrap();
        assert_eq!(&serde_json::to_value(&manifest.data).unwrap(), data);
    }
    let images = gan()["data"].clone();
    for (data, part, named) in [
        (&tokens, json!("images"), "it takes Images of the samples, and data has none"),
        (&arrays, json!({"array": "z"}), "it takes Array(\"z\") of the samples"),
        (&images, json!("tokens"), "it takes Tokens of the samples"),
        (&json!({}), json!("tokens"), "data has none or several of images, tokens and arrays"),
        (
            &json!({"tokens": tokens["tokens"], "arrays": arrays["arrays"]}),
            json!("tokens"),
            "none or several",
        ),
        (&json!({"tokens": tokens["tokens"], "classes": 3}), json!("tokens"), "data has 3 classes"),
        (&json!({"tokens": {"context": 0, "vocabulary": 2}}), json!("tokens"), "a context of 0"),
        (&json!({"tokens": {"context": 1, "vocabulary": 0}}), json!("tokens"), "a vocabulary of 0"),
        (&json!({"arrays": []}), json!("tokens"), "data has 0 arrays"),
        (&json!({"arrays": [array("a b")]}), json!("tokens"), "is not the name of a array"),
        (&json!({"arrays": [array("x"), array("x")]}), json!("tokens"), "the array x comes twice"),
        (
            &json!({"arrays": [{"name": "x", "kind": "float32", "shape": [0]}]}),
            json!("tokens"),
            "the array x: [0]",
        ),
        (
            &json!({"arrays": [{"name": "x", "kind": "complex64", "shape": []}]}),
            json!("tokens"),
            "unknown variant",
        ),
    ] {
        let refused = parse(&of(data, &part)).map(|_| data.clone()).unwrap_err().to_string();
        assert!(refused.contains(named), "{data}: {refused}");
    }
    let mut flat = of(&tokens, &json!("tokens"));
    flat["sample"]["output"] = json!([64, 16]);
    let refused = parse(&flat).unwrap_err().to_string();
    assert!(refused.contains("[64, 16], which are no images"), "{refused}");
}

fn machine() -> Machine {
    let features = ["avx2", "avx512f", "fma"].map(str::to_owned).into();
    Machine { torch: "2.11.0+cpu".to_owned(), arch: "x86_64".to_owned(), features, accelerator: None }
}

fn gpu(capability: &str, cuda: &str) -> Option<Accelerator> {
    Some(Accelerator { capability: capability.to_owned(), cuda: cuda.to_owned() })
}

#[test]
fn a_package_for_another_machine_is_refused_and_the_message_says_how_to_export_again() {
    let cpu = parse(&gan()).unwrap();
    assert_eq!(cpu.check_machine(&machine()), Ok(()));
    let mut of_cuda = gan();
    of_cuda["device"] = json!("cuda");
    of_cuda["capability"] = json!("9.0");
    of_cuda["cuda"] = json!("13.0");
    let cuda = parse(&of_cuda).unwrap();
    assert_eq!(cuda.check_machine(&Machine { accelerator: gpu("9.0", "13.0"), ..machine() }), Ok(()));
    let old: BTreeSet<String> = ["avx2".to_owned()].into();
    for (manifest, machine, named) in [
        (
            &cpu,
            Machine { torch: "2.12.0".to_owned(), ..machine() },
            "with PyTorch 2.11.0, and this worker runs PyTorch 2.12.0",
        ),
        (
            &cpu,
            Machine { features: old, ..machine() },
            "a processor with avx512f, which this machine's lacks",
        ),
        (
            &cpu,
            Machine { arch: "aarch64".to_owned(), ..machine() },
            "for x86_64 processors, and this machine has one of aarch64",
        ),
        (
            &cpu,
            Machine { accelerator: gpu("9.0", "13.0"), ..machine() },
            "for CPUs, and this worker computes on a GPU",
        ),
        (&cuda, machine(), "for GPUs, and this worker computes on a CPU"),
        (
            &cuda,
            Machine { accelerator: gpu("8.0", "13.0"), ..machine() },
            "compute capability 9.0, and this worker has 8.0",
        ),
        (
            &cuda,
            Machine { accelerator: gpu("9.0", "12.8"), ..machine() },
            "CUDA 13.0, and this worker has 12.8",
        ),
    ] {
        let refused = manifest.check_machine(&machine).unwrap_err().to_string();
        assert!(refused.contains(named) && refused.contains("ganglion.export("), "{refused}");
    }
}

#[test]
fn features_are_those_that_all_cores_have() {
    let x86 =
        "processor\t: 0\nflags\t\t: fpu avx2 avx512f\nbugs\t\t: x\n\nprocessor\t: 1\nflags\t\t: fpu avx2\n";
    assert_eq!(features(x86), ["avx2", "fpu"].map(str::to_owned).into());
    assert_eq!(features("Features\t: fp asimd\n"), ["asimd", "fp"].map(str::to_owned).into());
    assert!(features("").is_empty());
}

proptest! {
    /// Whatever is changed in a file, it is refused or read.
    #[test]
    fn a_changed_package_is_refused_or_read(at in any::<prop::sample::Index>(), cut in 0..9_usize, put in any::<[u8; 4]>(), len in 0..5_usize) {
        let mut bytes = archive(&members(&gan()));
        let at = at.index(bytes.len());
        let end = (at + cut).min(bytes.len());
        bytes.splice(at..end, put[..len].iter().copied());
        if let Ok(package) = read(&bytes) {
            prop_assert!(package.manifest.graphs().count() == 4);
        }
    }

    #[test]
    fn a_changed_manifest_is_refused_or_consistent(at in any::<prop::sample::Index>(), cut in 0..6_usize, put in "[0-9a-z.\"{}\\[\\],:-]{0,4}") {
        let text = gan().to_string();
        let at = at.index(text.len());
        let changed = format!("{}{put}{}", &text[..at], &text[(at + cut).min(text.len())..]);
        if let Ok(manifest) = Manifest::parse(changed.as_bytes()) {
            let again = Manifest::parse(serde_json::to_string(&manifest).unwrap().as_bytes());
            prop_assert_eq!(again, Ok(manifest));
        }
    }
}
