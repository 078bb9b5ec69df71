package tensordb

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/tensor"
)

// crashFiles is a file system in memory that keeps only what it must: what a
// file had when it was synced, and the names that a folder had when that was
// synced. It can crash in the middle of any operation.
type crashFiles struct {
	rng     *rand.Rand
	names   map[string]*inode // as processes see them
	durable map[string]*inode // as on disk
	pending []nameChange      // not synced, in order
	ops     int               // so far
	crashAt int               // the operation that is cut off; 0: none
	down    bool
	room    int // bytes that can be written, -1: any
}

type inode struct {
	data   []byte // as processes see it
	synced []byte
}

// nameChange is a creation (from is empty), a rename, or a removal (to is
// empty).
type nameChange struct {
	from, to string
	made     *inode // of a creation
}

var errCrash = errors.New("the machine crashed")

func newCrashFiles(rng *rand.Rand) *crashFiles {
	return &crashFiles{rng: rng, names: map[string]*inode{}, durable: map[string]*inode{}, room: -1}
}

// step counts an operation. It reports whether the operation has an effect
// yet, and an error if the machine is down after it.
func (c *crashFiles) step() (effect bool, err error) {
	if c.down {
		return false, errCrash
	}
	c.ops++
	if c.ops == c.crashAt {
		c.down = true
		return c.rng.IntN(2) == 0, errCrash
	}
	return true, nil
}

// reboot returns what is on disk after a crash.
func (c *crashFiles) reboot() *crashFiles {
	durable := maps.Clone(c.durable)
	// A change is lost, or not; where it is, so is what builds on it.
	lost := map[string]bool{}
	for _, p := range c.pending {
		if lost[p.from] || lost[p.to] || c.rng.IntN(2) == 0 {
			lost[p.from], lost[p.to] = true, true
			delete(lost, "")
			continue
		}
		switch {
		case p.from == "":
			durable[p.to] = p.made
		case p.to == "":
			delete(durable, p.from)
		default:
			durable[p.to] = durable[p.from]
			delete(durable, p.from)
		}
	}
	next := newCrashFiles(c.rng)
	for name, n := range durable {
		data := slices.Clone(n.synced)
		if !bytes.Equal(n.data, n.synced) && c.rng.IntN(3) > 0 {
			// Any part of what was written: cut off anywhere, or with a hole.
			data = slices.Clone(n.data[:c.rng.IntN(len(n.data)+1)])
			if at := len(data); at > 0 && c.rng.IntN(2) == 0 {
				clear(data[c.rng.IntN(at):])
			}
		}
		next.durable[name] = &inode{data: data, synced: slices.Clone(data)}
	}
	next.names = maps.Clone(next.durable)
	return next
}

func (c *crashFiles) create(path string) (fileWriter, error) {
	effect, err := c.step()
	if effect {
		if n := c.names[path]; n != nil {
			n.data = nil
		} else {
			n := &inode{}
			c.names[path] = n
			c.pending = append(c.pending, nameChange{to: path, made: n})
		}
	}
	if err != nil {
		return nil, err
	}
	return &crashWriter{c, c.names[path]}, nil
}

type crashWriter struct {
	c *crashFiles
	n *inode
}

func (w *crashWriter) Write(p []byte) (int, error) {
	effect, err := w.c.step()
	n := len(p)
	switch {
	case err != nil && effect:
		n = w.c.rng.IntN(len(p) + 1)
	case err != nil:
		n = 0
	case w.c.room >= 0 && n > w.c.room:
		n, err = w.c.room, syscall.ENOSPC
	}
	if w.c.room >= 0 {
		w.c.room -= n
	}
	w.n.data = append(w.n.data, p[:n]...)
	return n, err
}

func (w *crashWriter) Sync() error {
	effect, err := w.c.step()
	if effect {
		w.n.synced = slices.Clone(w.n.data)
	}
	return err
}

func (w *crashWriter) Close() error {
	_, err := w.c.step()
	return err
}

type crashReader struct {
	*bytes.Reader
}

func (r crashReader) Close() error         { return nil }
func (r crashReader) size() (int64, error) { return r.Size(), nil }

func (c *crashFiles) open(path string) (fileReader, error) {
	if c.down {
		return nil, errCrash
	}
	n := c.names[path]
	if n == nil {
		return nil, fmt.Errorf("opening %s: %w", path, fs.ErrNotExist)
	}
	return crashReader{bytes.NewReader(n.data)}, nil
}

func (c *crashFiles) rename(from, to string) error {
	effect, err := c.step()
	if n := c.names[from]; effect && n == nil {
		return fmt.Errorf("renaming %s: %w", from, fs.ErrNotExist)
	} else if effect {
		delete(c.names, from)
		c.names[to] = n
		c.pending = append(c.pending, nameChange{from: from, to: to})
	}
	return err
}

func (c *crashFiles) remove(path string) error {
	effect, err := c.step()
	if effect && c.names[path] == nil {
		return fmt.Errorf("removing %s: %w", path, fs.ErrNotExist)
	} else if effect {
		if c.room >= 0 {
			c.room += len(c.names[path].data)
		}
		delete(c.names, path)
		c.pending = append(c.pending, nameChange{from: path})
	}
	return err
}

func (c *crashFiles) list(dir string) ([]string, error) {
	if c.down {
		return nil, errCrash
	}
	var names []string
	for path := range c.names {
		if filepath.Dir(path) == dir {
			names = append(names, filepath.Base(path))
		}
	}
	slices.Sort(names)
	return names, nil
}

func (c *crashFiles) syncDir(string) error {
	effect, err := c.step()
	if effect {
		c.durable, c.pending = maps.Clone(c.names), nil
	}
	return err
}

// openCrash opens a database whose checkpoints are on c.
func openCrash(t *testing.T, c *crashFiles) *DB {
	t.Helper()
	db, err := openOn(c, Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	db.config.Dir = "dir" // in c
	db.removeTemporary()
	return db
}

// saveNumber writes the checkpoint in which every number of every tensor is n.
func saveNumber(db *DB, n int) error {
	for _, key := range []string{"a", "b"} {
		f := constant(100+n, float32(n))
		if _, err := db.Set(key, tensor.FromFloats([]int{len(f)}, f)); err != nil {
			return err
		}
	}
	return db.Checkpoint("c", []string{"a", "b"}, map[string]string{"n": strconv.Itoa(n)})
}

// recovered returns n of the checkpoint that is there, 0 for none, and checks
// that it is whole.
func recovered(t *testing.T, db *DB) int {
	t.Helper()
	meta, err := db.Recover("c")
	if errors.Is(err, ErrNoCheckpoint) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	n, _ := strconv.Atoi(meta["n"])
	for _, key := range []string{"a", "b"} {
		if f := get(t, db, key); len(f) != 100+n || slices.Min(f) != float32(n) || slices.Max(f) != float32(n) {
			t.Fatalf("%q of checkpoint %d has %d numbers from %v to %v", key, n, len(f), slices.Min(f), slices.Max(f))
		}
	}
	return n
}

// TestCrashAtEveryOperation cuts the power in the middle of each operation of
// four checkpoints, and then, at a random one, again: what was acknowledged is
// there, or what was being written is, whole; and things go on.
func TestCrashAtEveryOperation(t *testing.T) {
	seeds := uint64(12)
	if testing.Short() {
		seeds = 2
	}
	for seed := range seeds {
		for crashAt, crashed := 1, true; crashed; crashAt++ {
			rng := rand.New(rand.NewPCG(seed, uint64(crashAt)))
			c := newCrashFiles(rng)
			c.crashAt = crashAt
			acknowledged := 0
			crashed = false
			for life := range 3 {
				db := openCrash(t, c)
				if c.down { // while it removed what the crash before had left
					db.Close()
					c = c.reboot()
					db = openCrash(t, c)
				}
				got := recovered(t, db)
				if got != acknowledged && got != acknowledged+1 {
					t.Fatalf("seed %d, operation %d, life %d: recovered %d, %d was acknowledged", seed, crashAt, life, got, acknowledged)
				}
				for name := range c.names {
					if strings.HasSuffix(name, ".tmp") && !c.down {
						t.Fatalf("seed %d, operation %d, life %d: %s is left", seed, crashAt, life, name)
					}
				}
				acknowledged = got
				for range 4 {
					err := saveNumber(db, acknowledged+1)
					if errors.Is(err, errCrash) || c.down {
						if err == nil { // cut off in what comes after it is durable
							acknowledged++
						}
						break
					}
					if err != nil {
						t.Fatal(err)
					}
					acknowledged++
					if want := min(acknowledged, checkpointKept); len(c.names) > want+1 || life == 0 && len(c.names) != want {
						t.Fatalf("%d files after checkpoint %d: %v", len(c.names), acknowledged, slices.Sorted(maps.Keys(c.names)))
					}
				}
				db.Close()
				if life == 0 {
					crashed = c.down
				}
				c = c.reboot()
				c.crashAt = 1 + rng.IntN(40)
			}
		}
	}
}

// TestDiskFull fills the disk at every byte: the error says what to do, the
// checkpoint before is intact, nothing is left lying, and once there is room
// the next one works.
func TestDiskFull(t *testing.T) {
	c := newCrashFiles(newRand(t))
	db := openCrash(t, c)
	if err := saveNumber(db, 1); err != nil {
		t.Fatal(err)
	}
	size := len(c.names[slices.Collect(maps.Keys(c.names))[0]].data)
	for room := 0; room < size; room += 7 {
		c.room = room
		err := saveNumber(db, 2)
		wantError(t, err, ErrDiskFull)
		wantError(t, err, syscall.ENOSPC)
		if !strings.Contains(err.Error(), "no space left on the disk of dir: make room there") {
			t.Fatal(err)
		}
		if len(c.names) != 1 || recovered(t, db) != 1 {
			t.Fatalf("with room for %d bytes: %v", room, slices.Sorted(maps.Keys(c.names)))
		}
	}
	c.room = -1
	if err := saveNumber(db, 2); err != nil || recovered(t, db) != 2 {
		t.Fatalf("with room again: %v", err)
	}
}

// TestCheckpointWhileWriting checks that a checkpoint does not hold writers
// up, and has one moment of all tensors.
func TestCheckpointWhileWriting(t *testing.T) {
	c := newCrashFiles(newRand(t))
	writing, goOn := make(chan bool), make(chan bool)
	db := openCrash(t, c)
	for _, key := range []string{"a", "b"} {
		set(t, db, key, constant(101, 1))
	}
	db.files = &slowFiles{c, writing, goOn}
	saved := make(chan error, 1)
	go func() { saved <- db.Save("c") }()
	<-writing
	set(t, db, "a", constant(101, 9))
	db.Delete("b")
	close(goOn)
	if err := <-saved; err != nil {
		t.Fatal(err)
	}
	if _, err := db.Recover("c"); err != nil {
		t.Fatal(err)
	}
	if get(t, db, "a")[0] != 1 || get(t, db, "b")[0] != 1 {
		t.Error("the checkpoint is a mixture")
	}
}

type slowFiles struct {
	*crashFiles
	writing, goOn chan bool
}

func (s *slowFiles) create(path string) (fileWriter, error) {
	s.writing <- true
	<-s.goOn
	return s.crashFiles.create(path)
}

// TestSaveKeepsKinds saves all but gradients, with their expiry; what expires
// between is not recovered.
func TestSaveKeepsKinds(t *testing.T) {
	db := openCrash(t, newCrashFiles(newRand(t)))
	for _, key := range []string{"p", "g", "short", "long"} {
		set(t, db, key, constant(5, 1))
	}
	if err := db.SetGradient("g", true); err != nil {
		t.Fatal(err)
	}
	long, short := time.Now().Add(time.Hour), time.Now().Add(300*time.Millisecond)
	db.Expire("long", long)
	db.Expire("short", short)
	if err := db.Save("all"); err != nil {
		t.Fatal(err)
	}
	if err := db.Checkpoint("gradients", []string{"g"}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Wait(t.Context(), "short", db.mustVersion(t, "short")); err != nil { // until it is gone
		t.Fatal(err)
	}
	db.Delete("p", "g", "long")
	if _, err := db.Recover("all"); err != nil {
		t.Fatal(err)
	}
	if keys := db.Keys(""); !slices.Equal(keys, []string{"long", "p"}) {
		t.Fatalf("recovered %v", keys)
	}
	if at, _ := db.Expiry("long"); at.UnixMilli() != long.UnixMilli() {
		t.Errorf("the expiry came back as %v, not %v", at, long)
	}
	if _, err := db.Recover("gradients"); err != nil {
		t.Fatal(err)
	}
	if m, _ := db.Stat("g"); !m.Gradient {
		t.Error("a gradient came back as a parameter")
	}
	if used := db.Stats().MemoryUsed; used != 3*(24+overhead) {
		t.Errorf("%d bytes are in use", used)
	}
}

func (db *DB) mustVersion(t *testing.T, key string) uint64 {
	t.Helper()
	v, err := db.version(key)
	if err != nil {
		t.Fatal(err)
	}
	return v
}
