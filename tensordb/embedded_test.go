package tensordb

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensor"
)

// Buffers of every size come and go, mapped or not: what was released is
// given out again, the limit counts what is kept, and in the end there is
// nothing.
func TestMemoryPool(t *testing.T) {
	const limit = 64 << 20
	m := &memory{limit: limit, pool: make(map[int][][]byte)}
	for _, n := range []int{0, 1, 7, 8, pooledMin - 1, pooledMin, mappedMin - 1, mappedMin, mappedMin + 1, 4<<20 - 1, 4 << 20, 9 << 20} {
		b, err := m.alloc(n)
		if err != nil {
			t.Fatal(err)
		}
		if len(b.data) != n || cap(b.data) != n || len(b.buf) < n || len(b.buf) > n+n/8+8 {
			t.Errorf("%d bytes: %d of %d in %d", n, len(b.data), cap(b.data), len(b.buf))
		}
		for i := range b.data {
			b.data[i] = byte(i)
		}
		first := &b.buf[0]
		b.retain()
		b.release()
		if n > 0 && b.data[n-1] != byte(n-1) {
			t.Errorf("%d bytes changed while they are held", n)
		}
		b.release()
		again, err := m.alloc(n)
		if err != nil {
			t.Fatal(err)
		}
		if n >= pooledMin && &again.buf[0] != first {
			t.Errorf("%d bytes are not used again", n)
		}
		again.release()
		if live, free := m.usage(); live != 0 || live+free > limit {
			t.Fatalf("after %d bytes %d are in use, %d kept", n, live, free)
		}
	}
	_, err := m.alloc(limit)
	wantError(t, err, ErrMemory)
	late, err := m.alloc(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	m.close()
	late.release()
	if live, free := m.usage(); live != 0 || free != 0 {
		t.Errorf("after the end %d bytes are in use, %d kept", live, free)
	}
	defer func() {
		if recover() == nil {
			t.Error("a buffer can be released twice")
		}
	}()
	late.release()
}

// A limit that is reached drops what is kept for reuse before it refuses.
func TestMemoryEvicts(t *testing.T) {
	m := &memory{limit: 10 << 20, pool: make(map[int][][]byte)}
	for range 2 {
		for _, n := range []int{8 << 20, 5 << 20} {
			b, err := m.alloc(n)
			if err != nil {
				t.Fatal(err)
			}
			b.release()
		}
	}
}

// Large tensors are not on Go's heap.
func TestTensorsOffHeap(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("here they are")
	}
	db := open(t, Config{})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	d, err := db.Draft(tensor.Float32, 16<<20)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Commit("x"); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 1<<20 {
		t.Errorf("64 MiB of tensor take %d bytes of the heap", grown)
	}
}

// Who waits for a key is woken by whatever changes it, and by nothing else.
func TestWait(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(db *DB)
		gone   bool
	}{
		{"set", func(db *DB) { set(t, db, "x", constant(3, 2)) }, false},
		{"delete", func(db *DB) { db.Delete("x") }, true},
		{"expire", func(db *DB) { db.Expire("x", time.Now().Add(time.Millisecond)) }, true},
		{"rename away", func(db *DB) { db.Rename("y", "x") }, true},
		{"rename onto", func(db *DB) { db.Rename("x", "other") }, false},
		{"copy", func(db *DB) { db.Copy("x", "other") }, false},
		{"kind", func(db *DB) { db.SetGradient("x", true) }, false},
		{"step", func(db *DB) { db.SetStep("x", 4) }, false},
		{"scale", func(db *DB) { db.Scale("x", 2, "x") }, false},
		{"update", func(db *DB) {
			db.Update(UpdateKeys{Params: "x", State: "state", Gradient: "other"}, 1, optim.Config{Name: optim.SGD, LR: 1})
		}, false},
	} {
		db := open(t, Config{})
		set(t, db, "other", constant(3, 1))
		version := set(t, db, "x", constant(3, 1))
		type result struct {
			version uint64
			err     error
		}
		done := make(chan result, 1)
		go func() {
			v, err := db.Wait(t.Context(), "x", version)
			done <- result{v, err}
		}()
		for { // until it waits
			db.waitMu.Lock()
			waiting := len(db.waiting["x"])
			db.waitMu.Unlock()
			if waiting == 1 {
				break
			}
			runtime.Gosched()
		}
		set(t, db, "z", constant(3, 1)) // another key
		c.change(db)
		if r := <-done; r.err != nil || r.version == version || (r.version == 0) != c.gone {
			t.Errorf("%s: version %d, %v", c.name, r.version, r.err)
		}
		if len(db.waiting) > 0 {
			t.Errorf("%s: %d keys are waited for", c.name, len(db.waiting))
		}
	}
	db := open(t, Config{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := db.Wait(ctx, "none", 0); !errors.Is(err, context.DeadlineExceeded) || len(db.waiting) > 0 {
		t.Errorf("waiting for nothing: %v", err)
	}
}

func TestExpiry(t *testing.T) {
	db := open(t, Config{})
	if db.Expire("none", time.Now()) {
		t.Error("what is not there expires")
	}
	at := time.Now().Add(time.Hour)
	set(t, db, "x", constant(3, 1))
	if !db.Expire("x", at) {
		t.Fatal("no expiry")
	}
	if got, ok := db.Expiry("x"); !ok || !got.Equal(at) {
		t.Errorf("expires at %v", got)
	}
	db.Rename("y", "x")
	if got, _ := db.Expiry("y"); !got.Equal(at) {
		t.Error("a rename forgets the expiry")
	}
	db.Copy("x", "y")
	if got, _ := db.Expiry("x"); !got.IsZero() {
		t.Error("a copy expires")
	}
	set(t, db, "y", constant(3, 1))
	if got, _ := db.Expiry("y"); !got.IsZero() {
		t.Error("a new version expires")
	}
	db.Expire("y", time.Now()) // at once, whether or not a timer ran
	if db.Exists("y") || slices.Contains(db.Keys(""), "y") || db.Delete("y") != 0 {
		t.Error("what has expired is there")
	}
	if _, err := db.Get("y"); !errors.Is(err, ErrNoKey) {
		t.Error(err)
	}
}

// Where memory is short, the gradient used least recently goes, and never a
// parameter.
func TestDropGradients(t *testing.T) {
	db := open(t, Config{MaxMemory: 4 * (4000 + overhead), DropGradients: true})
	for _, key := range []string{"p", "g1", "g2", "g3"} {
		set(t, db, key, constant(1000, 1))
		if key != "p" {
			if err := db.SetGradient(key, true); err != nil {
				t.Fatal(err)
			}
		}
	}
	get(t, db, "g1") // g2 is the oldest now
	for i, want := range []string{"g1 g3 p q0", "g1 p q0 q1", "p q0 q1 q2"} {
		set(t, db, fmt.Sprint("q", i), constant(1000, 1))
		if keys := strings.Join(db.Keys(""), " "); keys != want {
			t.Fatalf("after %d: %s, want %s", i, keys, want)
		}
	}
	_, err := db.Set("q3", tensor.FromFloats([]int{1000}, constant(1000, 1)))
	wantError(t, err, ErrMemory)
	if !strings.Contains(err.Error(), "raise the database's memory limit or delete keys") || len(db.Keys("")) != 4 {
		t.Errorf("%v, %v", err, db.Keys(""))
	}
	db.Delete("q0")
	set(t, db, "q3", constant(1000, 1))
}

func TestArithmetic(t *testing.T) {
	db := open(t, Config{})
	const n = 20_000 // more than a tile
	rng := newRand(t)
	x := numbers(n, func(int) float32 { return rng.Float32() - 0.5 })
	y := numbers(n, func(int) float32 { return rng.Float32() - 0.5 })
	set(t, db, "x", x)
	set(t, db, "y", y)
	same := func(what, key string, f func(i int) float32) {
		t.Helper()
		if !slices.Equal(get(t, db, key), numbers(n, f)) {
			t.Errorf("%s differs", what)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(db.Scale("z", 3, "x"))
	same("Scale", "z", func(i int) float32 { return 3 * x[i] })
	must(db.Axpy("z", 3, "x", "y"))
	same("Axpy", "z", func(i int) float32 { return float32(3*x[i]) + y[i] })
	must(db.Sum("z", []string{"x", "y", "x"}))
	same("Sum", "z", func(i int) float32 { return (x[i] + y[i]) + x[i] })
	must(db.Median("z", []string{"x", "y", "x"}))
	same("Median", "z", func(i int) float32 { return x[i] })
	must(db.TrimmedMean("z", []string{"x", "y", "x"}, 1))
	same("TrimmedMean", "z", func(i int) float32 { return x[i] })
	wantError(t, db.TrimmedMean("z", []string{"x", "y"}, 1), ErrOutOfRange)

	dot, xx, yy := 0.0, 0.0, 0.0
	for i := range x {
		dot += float64(x[i]) * float64(y[i])
		xx += float64(x[i]) * float64(x[i])
		yy += float64(y[i]) * float64(y[i])
	}
	near := func(what string, got float64, err error, want float64) {
		t.Helper()
		if err != nil || math.Abs(got-want) > 1e-9*max(1, math.Abs(want)) {
			t.Errorf("%s is %v, %v, want %v", what, got, err, want)
		}
	}
	v, err := db.Dot("x", "y")
	near("Dot", v, err, dot)
	v, err = db.Norm("x")
	near("Norm", v, err, math.Sqrt(xx))
	v, err = db.Cosine("x", "y")
	near("Cosine", v, err, dot/math.Sqrt(xx*yy))
	v, err = db.Cosine("x", "x")
	near("Cosine with itself", v, err, 1)
	set(t, db, "zero", constant(n, 0))
	v, err = db.Cosine("x", "zero")
	near("Cosine with zero", v, err, 0)
	v, err = db.Clip("z", "x", 1)
	near("Clip", v, err, math.Sqrt(xx))
	if v, err = db.Norm("z"); err != nil || math.Abs(v-1) > 1e-5 {
		t.Errorf("clipped to %v, %v", v, err)
	}
	v, err = db.Clip("z", "x", 1e6)
	near("Clip of what is short", v, err, math.Sqrt(xx))
	same("Clip of what is short", "z", func(i int) float32 { return x[i] })
	_, err = db.Clip("z", "x", float32(math.NaN()))
	wantError(t, err, ErrOutOfRange)

	must(db.Quantise("q", "x"))
	must(db.Dequantise("z", "q", []int{n}))
	for i, v := range get(t, db, "z") {
		if math.Abs(float64(v-x[i])) > 0.5/127/2*1.01 {
			t.Fatalf("%v came back as %v", x[i], v)
		}
	}
	wantError(t, db.Dequantise("z", "q", []int{n + 300}), ErrWrongType)
	wantError(t, db.Dequantise("z", "x", []int{n}), ErrWrongType)
	set(t, db, "nan", []float32{1, float32(math.NaN())})
	wantError(t, db.Quantise("z", "nan"), ErrNotFinite)
	_, err = db.Norm("nan")
	wantError(t, err, ErrNotFinite)
	wantError(t, db.Median("z", []string{"nan", "nan"}), ErrNotFinite)
	wantError(t, db.Scale("z", math.MaxFloat32, "nan"), ErrNotFinite)
	wantError(t, db.Axpy("z", 1, "x", "nan"), ErrWrongType)
	if v, err := db.Norm("z"); err != nil || math.Abs(v-math.Sqrt(xx)) > 0.1 {
		t.Errorf("refused commands changed z: its norm is %v, %v", v, err)
	}

	if _, err := db.Set("m", tensor.FromFloats([]int{100, 200}, x)); err != nil {
		t.Fatal(err)
	}
	must(db.Slice("z", "m", 3, 5))
	if !slices.Equal(get(t, db, "z"), x[600:1000]) {
		t.Error("Slice differs")
	}
	must(db.Slice("z", "m", 5, 5))
	wantError(t, db.Slice("z", "m", 5, 101), ErrOutOfRange)
	wantError(t, db.Slice("z", "m", 5, 4), ErrOutOfRange)
	part, err := db.Range("m", 8, 12)
	must(err)
	if !slices.Equal(part.data, tensor.Bytes(x)[8:20]) {
		t.Error("Range differs")
	}
	part.Release()
	for _, c := range [][3]int{{4 * n, 10, 0}, {5 * n, 10, 0}, {4*n - 3, 10, 3}} {
		part, err := db.Range("m", c[0], c[1])
		must(err)
		if len(part.data) != c[2] {
			t.Errorf("Range %v has %d bytes", c, len(part.data))
		}
		part.Release()
	}
}

// UpdateInto leaves what was, and is applied once.
func TestUpdateInto(t *testing.T) {
	db := open(t, Config{})
	set(t, db, "p0", constant(100, 5))
	set(t, db, "g", constant(100, 1))
	adam := optim.Config{Name: optim.Adam, LR: 0.1}
	for step := uint64(1); step <= 3; step++ {
		k := UpdateKeys{
			Params: fmt.Sprint("p", step-1), State: fmt.Sprint("s", step-1), Gradient: "g",
			IntoParams: fmt.Sprint("p", step), IntoState: fmt.Sprint("s", step),
		}
		for try := range 3 {
			if applied, err := db.Update(k, step, adam); err != nil || applied != (try == 0) {
				t.Fatalf("step %d, try %d: %v, %v", step, try, applied, err)
			}
		}
		_, err := db.Update(k, step+1, adam)
		wantError(t, err, ErrOutOfRange)
	}
	set(t, db, "p", constant(100, 5))
	for step := uint64(1); step <= 3; step++ {
		if _, err := db.Update(UpdateKeys{Params: "p", State: "s", Gradient: "g"}, step, adam); err != nil {
			t.Fatal(err)
		}
	}
	if a, b := get(t, db, "p"), get(t, db, "p3"); !slices.Equal(a, b) || get(t, db, "p0")[0] != 5 {
		t.Error("in place and apart differ")
	}
}

// rawReader is a connection on which bytes are counted.
func rawReader(t *testing.T, socket string) (net.Conn, *bufio.Reader) {
	t.Helper()
	nc, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(20 * time.Second))
	return nc, bufio.NewReader(nc)
}

// Replies byte for byte.
func TestReplyBytes(t *testing.T) {
	db, socket := startServer(t, Config{}, ServerConfig{Version: "v"})
	set(t, db, "x", []float32{3, 4})
	nc, r := rawReader(t, socket)
	for _, c := range []struct{ send, want string }{
		{"*4\r\n$5\r\nHELLO\r\n$1\r\n3\r\n$4\r\nAUTH\r\n$7\r\ndefault\r\n", "-ERR"},
		{"*1\r\n$4\r\nPING\r\n", "-NOAUTH Authentication required: send AUTH with the token first\r\n"},
		{"*2\r\n$5\r\nHELLO\r\n$1\r\n4\r\n", "-NOPROTO unsupported protocol version: 2 and 3 are spoken here\r\n"},
		{"*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n", "-NOAUTH HELLO must be called with the token: HELLO 3 AUTH default token\r\n"},
		{
			fmt.Sprintf("*7\r\n$5\r\nHELLO\r\n$1\r\n3\r\n$4\r\nAUTH\r\n$7\r\ndefault\r\n$%d\r\n%s\r\n$7\r\nSETNAME\r\n$2\r\nme\r\n", len(adminToken), adminToken),
			"%7\r\n$6\r\nserver\r\n$5\r\nspirt\r\n$7\r\nversion\r\n$1\r\nv\r\n$5\r\nproto\r\n:3\r\n$2\r\nid\r\n:1\r\n$4\r\nmode\r\n$10\r\nstandalone\r\n$4\r\nrole\r\n$6\r\nmaster\r\n$7\r\nmodules\r\n*0\r\n",
		},
		{"*2\r\n$6\r\nCLIENT\r\n$7\r\nGETNAME\r\n", "$2\r\nme\r\n"},
		{"*2\r\n$6\r\nCLIENT\r\n$2\r\nID\r\n", ":1\r\n"},
		{"*2\r\n$11\r\nTENSOR.NORM\r\n$1\r\nx\r\n", ",5\r\n"},
		{"*4\r\n$10\r\nTENSOR.GET\r\n$1\r\nx\r\n$5\r\nIFNOT\r\n$1\r\n0\r\n", "*4\r\n$7\r\nfloat32\r\n*1\r\n:2\r\n"},
	} {
		if _, err := io.WriteString(nc, c.send); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(c.want))
		if _, err := io.ReadFull(r, got); err != nil || string(got) != c.want {
			t.Fatalf("%q: %q, %v, want %q", c.send, got, err, c.want)
		}
		if !strings.HasSuffix(c.want, "\r\n") {
			r.ReadString('\n')
		}
	}
}

func TestCommandCommand(t *testing.T) {
	_, socket := startServer(t, Config{}, ServerConfig{})
	c := dial(t, socket, adminToken)
	if n := do(t, c, "COMMAND", "COUNT").Int; int(n) != len(Commands()) {
		t.Errorf("COUNT %d", n)
	}
	if r := do(t, c, "COMMAND", "LIST"); len(r.Elems) != len(Commands()) || string(r.Elems[0].Bytes) != "auth" {
		t.Errorf("LIST %d", len(r.Elems))
	}
	r := do(t, c, "COMMAND", "INFO", "tensor.set", "nonsense")
	if len(r.Elems) != 2 || r.Elems[0].Elems[1].Int != -5 || r.Elems[0].Elems[3].Int != 1 || r.Elems[1].Kind != resp.Nil {
		t.Errorf("INFO %+v", r)
	}
	docs := do(t, c, "COMMAND", "DOCS", "TENSOR.SCALE", "nonsense")
	if len(docs.Elems) != 2 || string(docs.Elems[0].Bytes) != "tensor.scale" || !slices.ContainsFunc(docs.Elems[1].Elems, func(e resp.Reply) bool { return string(e.Bytes) == "TENSOR.SCALE destination alpha key" }) {
		t.Errorf("DOCS %+v", docs)
	}
	wantCode(t, c, "ERR", "CLIENT", "SETNAME", "two words")
	wantCode(t, c, "ERR", "CLIENT", "NONSENSE")
	wantCode(t, dial(t, socket, readToken), "NOPERM", "CLIENT", "LIST")
	other := dial(t, socket, adminToken)
	id := do(t, other, "CLIENT", "ID").Int
	if list := string(do(t, c, "CLIENT", "LIST").Bytes); !strings.Contains(list, fmt.Sprintf("id=%d ", id)) {
		t.Errorf("LIST %s", list)
	}
	if n := do(t, c, "CLIENT", "KILL", "ID", id).Int; n != 1 {
		t.Errorf("KILL %d", n)
	}
	if _, err := other.Do(t.Context(), "PING"); err == nil {
		t.Error("a killed connection goes on")
	}
}

// A scan lists what is there all the while, whatever comes and goes.
func TestScan(t *testing.T) {
	db, socket := startServer(t, Config{}, ServerConfig{})
	c := dial(t, socket, adminToken)
	rng := newRand(t)
	for i := range 200 {
		set(t, db, fmt.Sprint("stays", i), constant(1, 1))
		set(t, db, fmt.Sprint("goes", i), constant(1, 1))
	}
	seen := map[string]int{}
	cursor := "0"
	for calls := 0; ; calls++ {
		r := do(t, c, "SCAN", cursor, "MATCH", "stays*", "COUNT", 1+rng.IntN(20))
		cursor = string(r.Elems[0].Bytes)
		for _, key := range r.Elems[1].Elems {
			seen[string(key.Bytes)]++
		}
		if cursor == "0" {
			break
		}
		db.Delete(fmt.Sprint("goes", rng.IntN(200)))
		set(t, db, fmt.Sprint("stays", 200+calls), constant(1, 1))
		if calls > 1000 {
			t.Fatal("the scan does not end")
		}
	}
	for i := range 200 {
		if n := seen[fmt.Sprint("stays", i)]; n != 1 {
			t.Errorf("key %d was listed %d times", i, n)
		}
	}
	for _, bad := range [][]any{{"SCAN", "x"}, {"SCAN", "0", "COUNT", "0"}, {"SCAN", "0", "MATCH"}, {"SCAN", "0", "MATCH", "a*b"}} {
		if _, err := c.Do(t.Context(), bad...); err == nil {
			t.Errorf("%v is answered", bad)
		}
	}
}

// Half a command and an end change nothing, and a length that is announced
// takes no memory before its bytes come.
func TestHalfCommand(t *testing.T) {
	db, socket := startServer(t, Config{MaxMemory: 1 << 20}, ServerConfig{})
	nc, r := rawReader(t, socket)
	fmt.Fprintf(nc, "*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n", len(adminToken), adminToken)
	if line, _ := r.ReadString('\n'); line != "+OK\r\n" {
		t.Fatal(line)
	}
	io.WriteString(nc, "*6\r\n$10\r\nTENSOR.SET\r\n$1\r\nx\r\n$5\r\nuint8\r\n$1\r\n1\r\n$4\r\n1000\r\n$1000\r\nonly this")
	nc.Close()
	nc, r = rawReader(t, socket)
	fmt.Fprintf(nc, "*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n", len(adminToken), adminToken)
	r.ReadString('\n')
	io.WriteString(nc, "*6\r\n$10\r\nTENSOR.SET\r\n$1\r\nx\r\n$5\r\nuint8\r\n$1\r\n1\r\n$10\r\n2147483648\r\n$2147483648\r\n")
	if line, _ := r.ReadString('\n'); !strings.HasPrefix(line, "-TOOLARGE ") {
		t.Errorf("2 GB: %q", line)
	}
	if _, err := r.ReadByte(); err != io.EOF {
		t.Errorf("after 2 GB: %v", err)
	}
	if db.Exists("x") {
		t.Error("half a command set something")
	}
	if used := db.Stats().MemoryUsed; used > 1000+2*overhead {
		t.Errorf("%d bytes are in use", used)
	}
}
