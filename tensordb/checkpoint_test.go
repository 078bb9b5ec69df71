package tensordb

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/tensor"
)

// crashDir, when set, makes this test binary write checkpoints there until it
// is killed.
const crashDir = "SPIRT_TEST_CRASH_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		if err := checkpointForEver(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// regenerate has tests write anew what they compare with.
var regenerate = flag.Bool("regenerate", false, "write the golden checkpoint and docs/commands.md anew")

// example is a checkpoint with every kind of content; no data is shared.
func example() *checkpoint {
	c := &checkpoint{sequence: 7, versions: 1234, meta: map[string]string{"round": "12", "model": `{"name":"lenet5"}`, "": "ü"}}
	for _, e := range []checkpointEntry{
		{key: "average", dtype: tensor.Float32, shape: []int{1}, gradient: true, data: tensor.Bytes(constant(1, 3))},
		{key: "empty", dtype: tensor.Float32, shape: []int{0}},
		{key: "labels", dtype: tensor.Uint8, shape: []int{3}, data: []byte{1, 2, 3}},
		{key: "params", dtype: tensor.Float32, shape: []int{2, 10}, data: tensor.Bytes(numbers(20, func(i int) float32 { return float32(i) / 4 }))},
		{key: "scalar", dtype: tensor.Int32, shape: []int{}, expires: time.UnixMilli(4102444800123), data: []byte{1, 0, 0, 0}},
		{key: "state", dtype: tensor.Float32, shape: []int{40}, step: 12, data: tensor.Bytes(constant(40, 0.5))},
	} {
		e.hash = treehash.Sum(e.data)
		c.entries = append(c.entries, e)
	}
	return c
}

func exampleFile(t testing.TB) []byte {
	var file bytes.Buffer
	if err := example().write(&file); err != nil {
		t.Fatal(err)
	}
	return file.Bytes()
}

func readBytes(t testing.TB, file []byte) (*checkpoint, error) {
	t.Helper()
	mem := &memory{pool: make(map[int][][]byte), limit: int64(len(file))*2 + 1<<20}
	c, err := readCheckpoint(bytes.NewReader(file), int64(len(file)), mem)
	if live, _ := mem.usage(); err != nil && live != 0 {
		t.Fatalf("%d bytes leak with %v", live, err)
	}
	return c, err
}

func TestCheckpointGolden(t *testing.T) {
	if *regenerate {
		if err := os.WriteFile("testdata/golden-0000000000000007.ckpt", exampleFile(t), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile("testdata/golden-0000000000000007.ckpt")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(exampleFile(t), golden) {
		t.Error("the format changed: that needs another format version")
	}
	c, err := readBytes(t, golden)
	if err != nil {
		t.Fatal(err)
	}
	want := example()
	if c.sequence != want.sequence || c.versions != want.versions || !maps.Equal(c.meta, want.meta) || len(c.entries) != len(want.entries) {
		t.Fatalf("read %+v", c)
	}
	for i, e := range c.entries {
		w := want.entries[i]
		if e.key != w.key || e.dtype != w.dtype || e.gradient != w.gradient || !e.expires.Equal(w.expires) || !slices.Equal(e.shape, w.shape) || e.step != w.step || !bytes.Equal(e.data, w.data) {
			t.Errorf("entry %d: %+v, want %+v", i, e, w)
		}
	}
	db := open(t, Config{Dir: "testdata"})
	meta, err := db.Recover("golden")
	if err != nil || meta["round"] != "12" || get(t, db, "params")[19] != 4.75 {
		t.Fatalf("recovered %v, %v", meta, err)
	}
	if m, err := db.Stat("average"); err != nil || !m.Gradient {
		t.Errorf("the gradient came back as %+v, %v", m, err)
	}
	if at, ok := db.Expiry("scalar"); !ok || at.UnixMilli() != 4102444800123 {
		t.Errorf("the expiry came back as %v, %v", at, ok)
	}
	if at, ok := db.Expiry("params"); !ok || !at.IsZero() {
		t.Errorf("a tensor that is kept came back with the expiry %v, %v", at, ok)
	}

	_, err = db.Recover("version1")
	wantError(t, err, ErrFormatVersion)
	if !strings.Contains(err.Error(), "another format version") {
		t.Errorf("the error does not say so: %v", err)
	}
}

// TestCheckpointCut truncates the file at every length: each is told to be
// torn.
func TestCheckpointCut(t *testing.T) {
	file := exampleFile(t)
	for n := range file {
		if _, err := readBytes(t, file[:n]); !errors.Is(err, ErrTorn) {
			t.Fatalf("cut at %d of %d: %v", n, len(file), err)
		}
	}
	// The same when the file shrinks while it is read.
	mem := &memory{pool: make(map[int][][]byte)}
	for n := range file {
		if _, err := readCheckpoint(bytes.NewReader(file[:n]), int64(len(file)), mem); !errors.Is(err, ErrTorn) {
			t.Fatalf("shrunk to %d of %d: %v", n, len(file), err)
		}
	}
	if _, err := readBytes(t, append(slices.Clone(file), 0)); !errors.Is(err, ErrChecksum) {
		t.Fatalf("a byte too many: %v", err)
	}
}

// TestCheckpointFlippedBits flips every bit of the file: each is found.
func TestCheckpointFlippedBits(t *testing.T) {
	file := exampleFile(t)
	for i := range file {
		for bit := range 8 {
			file[i] ^= 1 << bit
			if _, err := readBytes(t, file); !errors.Is(err, ErrChecksum) {
				t.Fatalf("bit %d of byte %d flipped: %v", bit, i, err)
			}
			file[i] ^= 1 << bit
		}
	}
}

// resealed sets header bytes and the header's checksum.
func resealed(file []byte, change func(h []byte)) []byte {
	file = slices.Clone(file)
	change(file)
	sum := crc32.Checksum(file[:checkpointHeader-4], castagnoli)
	binary.LittleEndian.PutUint32(file[checkpointHeader-4:], sum)
	return file
}

func TestCheckpointRefuses(t *testing.T) {
	file := exampleFile(t)
	for _, c := range []struct {
		name string
		file []byte
		want error
	}{
		{"another version", resealed(file, func(h []byte) { h[8] = 3 }), ErrFormatVersion},
		{"another version, torn", resealed(file, func(h []byte) { h[8] = 3 })[:70], ErrFormatVersion},
		{"a directory beyond the file", resealed(file, func(h []byte) { binary.LittleEndian.PutUint32(h[12:], 1<<31) }), ErrChecksum},
		{"a length of 2^64-1", resealed(file, func(h []byte) { binary.LittleEndian.PutUint64(h[16:], 1<<64-1) }), ErrTorn},
		{"too many tensors", resealed(file, func(h []byte) { binary.LittleEndian.PutUint32(h[40:], 1<<32-1) }), ErrChecksum},
		{"too few tensors", resealed(file, func(h []byte) { h[40]-- }), ErrChecksum},
		{"too many metadata", resealed(file, func(h []byte) { binary.LittleEndian.PutUint32(h[44:], 1<<32-1) }), ErrChecksum},
		{"another file", []byte(strings.Repeat("PK\x03\x04", 100)), ErrChecksum},
	} {
		if _, err := readBytes(t, c.file); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

func FuzzReadCheckpoint(f *testing.F) {
	f.Add(exampleFile(f))
	for _, name := range []string{"golden", "version1"} {
		seed, err := os.ReadFile("testdata/" + name + "-0000000000000007.ckpt")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		if len(file) >= checkpointHeader {
			// Let the fuzzer past the checksums of header and directory.
			n := min(int(binary.LittleEndian.Uint32(file[12:])), len(file)-checkpointHeader)
			if n >= 0 {
				file = resealed(file, func(h []byte) {
					copy(h, checkpointMagic)
					binary.LittleEndian.PutUint32(h[8:], checkpointVersion)
					binary.LittleEndian.PutUint64(h[16:], uint64(len(h)))
					binary.LittleEndian.PutUint32(h[48:], crc32.Checksum(h[checkpointHeader:checkpointHeader+n], castagnoli))
				})
			}
		}
		c, err := readBytes(t, file)
		if err != nil {
			return
		}
		// There is one way to write what was read, but for reserved bytes.
		var again bytes.Buffer
		if err := c.write(&again); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(again.Bytes()[checkpointHeader:], file[checkpointHeader:]) {
			t.Fatal("written again it differs")
		}
	})
}

func TestCheckpointAndRecover(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "checkpoints")
	db := open(t, Config{Dir: dir})
	_, err := db.Recover("peer")
	wantError(t, err, ErrNoCheckpoint)

	sgd := optim.Config{Name: "sgd", LR: 1, Momentum: 0.5}
	set(t, db, "p", constant(5000, 0))
	set(t, db, "g", constant(5000, 1))
	for step := uint64(1); step <= 4; step++ {
		if _, err := db.Update(UpdateKeys{Params: "p", State: "s", Gradient: "g"}, step, sgd); err != nil {
			t.Fatal(err)
		}
		if err := db.Checkpoint("peer", []string{"s", "p"}, map[string]string{"round": fmt.Sprint(step)}); err != nil {
			t.Fatal(err)
		}
	}
	files, _ := os.ReadDir(dir)
	if len(files) != checkpointKept {
		t.Fatalf("%d files are kept, want %d", len(files), checkpointKept)
	}
	hash, _ := db.Hash("p")

	back := open(t, Config{Dir: dir})
	meta, err := back.Recover("peer")
	if err != nil || meta["round"] != "4" {
		t.Fatalf("recovered %v, %v", meta, err)
	}
	if h, _ := back.Hash("p"); h != hash {
		t.Fatal("the parameters differ")
	}
	if back.Exists("g") || back.Stats().LastVersion <= db.Stats().LastVersion {
		t.Fatal("more was recovered, or version numbers come again")
	}
	set(t, back, "g", constant(5000, 1))
	if applied, err := back.Update(UpdateKeys{Params: "p", State: "s", Gradient: "g"}, 4, sgd); err != nil || applied {
		t.Fatalf("the step was forgotten: %v, %v", applied, err)
	}

	// The newest one damaged: the one before is used. Both: the error says why.
	newest := filepath.Join(dir, "peer-0000000000000004.ckpt")
	flip(t, newest, 5000)
	if meta, err = back.Recover("peer"); err != nil || meta["round"] != "3" {
		t.Fatalf("with a flipped bit: %v, %v", meta, err)
	}
	if err := os.Truncate(filepath.Join(dir, "peer-0000000000000003.ckpt"), 3000); err != nil {
		t.Fatal(err)
	}
	before := back.Stats()
	_, err = back.Recover("peer")
	wantError(t, err, ErrTorn)
	wantError(t, err, ErrChecksum)
	if errors.Is(err, ErrNoCheckpoint) || back.Stats() != before {
		t.Fatal("a failed recovery changed something")
	}
	// And the next checkpoint goes on with a number of its own.
	if err := back.Checkpoint("peer", []string{"p"}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "peer-0000000000000005.ckpt")); err != nil {
		t.Fatal(err)
	}

	wantError(t, db.Checkpoint("peer", []string{"none"}, nil), ErrNoKey)
	for _, name := range []string{"", "../x", ".x", "a/b", strings.Repeat("x", 65)} {
		wantError(t, db.Checkpoint(name, nil, nil), ErrOutOfRange)
	}
	if err := open(t, Config{}).Checkpoint("peer", nil, nil); err == nil {
		t.Error("a checkpoint without a folder")
	}
	small := open(t, Config{Dir: dir, MaxMemory: 1000})
	_, err = small.Recover("peer")
	wantError(t, err, ErrMemory)
	if small.Stats().MemoryUsed != 0 {
		t.Error("a recovery that does not fit leaks")
	}
}

func flip(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 4
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

// failingWriter passes on so many bytes and then fails.
type failingWriter struct {
	w    io.Writer
	left int
}

var errDisk = errors.New("the disk is full")

func (f *failingWriter) Write(p []byte) (int, error) {
	if len(p) > f.left {
		n, _ := f.w.Write(p[:f.left])
		f.left = 0
		return n, errDisk
	}
	f.left -= len(p)
	return f.w.Write(p)
}

// TestCrashAtEveryWrite fails, and dies, at every byte of the second
// checkpoint: the first is recovered, and the next one can be written.
func TestCrashAtEveryWrite(t *testing.T) {
	dir := t.TempDir()
	db := open(t, Config{Dir: dir})
	set(t, db, "p", constant(40, 1))
	if err := db.Checkpoint("c", []string{"p"}, map[string]string{"n": "1"}); err != nil {
		t.Fatal(err)
	}
	second := example()
	second.sequence = 2
	path := filepath.Join(dir, "c-0000000000000002.ckpt")
	whole := exampleFile(t)
	check := func(n int) {
		t.Helper()
		if meta, err := db.Recover("c"); err != nil || meta["n"] != "1" {
			t.Fatalf("at byte %d: recovered %v, %v", n, meta, err)
		}
	}
	for n := range whole {
		err := writeFileDurably(disk{}, path, func(w io.Writer) error { return second.write(&failingWriter{w, n}) })
		wantError(t, err, errDisk)
		if n%16 == 0 { // dying differs: the temporary file stays
			if err := os.WriteFile(path+".tmp", whole[:n], 0o600); err != nil {
				t.Fatal(err)
			}
			check(n)
		}
	}
	check(len(whole))
	if err := db.Checkpoint("c", []string{"p"}, map[string]string{"n": "2"}); err != nil {
		t.Fatal(err)
	}
	if meta, err := db.Recover("c"); err != nil || meta["n"] != "2" {
		t.Fatalf("after the crashes: %v, %v", meta, err)
	}
}

// checkpointForEver goes on from the last checkpoint of dir: in round n every
// number of every tensor is n.
func checkpointForEver(dir string) error {
	db, err := Open(Config{Dir: dir})
	if err != nil {
		return err
	}
	n := 0
	if meta, err := db.Recover("loop"); err == nil {
		n, _ = strconv.Atoi(meta["n"])
	} else if !errors.Is(err, ErrNoCheckpoint) {
		return err
	}
	for {
		n++
		for _, key := range []string{"a", "b"} {
			f := constant(100_000, float32(n))
			if _, err := db.Set(key, tensor.FromFloats([]int{len(f)}, f)); err != nil {
				return err
			}
		}
		if err := db.Checkpoint("loop", []string{"a", "b"}, map[string]string{"n": strconv.Itoa(n)}); err != nil {
			return err
		}
		fmt.Println(n)
	}
}

// TestKill kills a process while it writes checkpoints, some times over: what
// it had reported is there, whole.
func TestKill(t *testing.T) {
	rng := newRand(t)
	dir := t.TempDir()
	for range 6 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), crashDir+"="+dir)
		var errors bytes.Buffer
		cmd.Stderr = &errors
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		reported := 0
		lines := bufio.NewScanner(out)
		for range 1 + rng.IntN(6) {
			if !lines.Scan() {
				cmd.Wait()
				t.Fatalf("the process ended: %s", errors.String())
			}
			reported, _ = strconv.Atoi(lines.Text())
		}
		spin(rng)
		cmd.Process.Kill()
		for lines.Scan() {
			reported, _ = strconv.Atoi(lines.Text())
		}
		cmd.Wait()

		db := open(t, Config{Dir: dir})
		meta, err := db.Recover("loop")
		if err != nil {
			t.Fatal(err)
		}
		n, _ := strconv.Atoi(meta["n"])
		if n < reported || n > reported+1 {
			t.Fatalf("recovered %d, %d was reported", n, reported)
		}
		for _, key := range []string{"a", "b"} {
			f := get(t, db, key)
			if slices.Min(f) != float32(n) || slices.Max(f) != float32(n) {
				t.Fatalf("%q of checkpoint %d has numbers from %v to %v", key, n, slices.Min(f), slices.Max(f))
			}
		}
	}
}

// spin does some work of random length, to hit another moment each time.
func spin(rng *rand.Rand) {
	buf := make([]byte, rng.IntN(4<<20))
	treehash.Sum(buf)
}
