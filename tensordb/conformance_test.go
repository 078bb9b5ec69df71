package tensordb_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensor"
	"github.com/spirt-ml/spirt/tensordb"
)

// One suite for all hosts of the database: what each answers to these commands
// must be what stands in the golden file, to the bit. Versions are left out,
// and so are the words of errors that are not the database's own.

var updateGolden = flag.Bool("update", false, "write golden files anew")

const conformanceGolden = "testdata/conformance.txt"

// host is a database to talk to.
type host struct {
	t    *testing.T
	conn *resp.Conn
	log  strings.Builder
	key  func(name string) string
}

// do sends a command; words that start with @ are keys.
func (h *host) do(args ...any) {
	h.t.Helper()
	var shown []string
	send := make([]any, len(args))
	for i, a := range args {
		send[i] = a
		switch v := a.(type) {
		case string:
			if name, ok := strings.CutPrefix(v, "@"); ok {
				send[i] = h.key(name)
			}
			shown = append(shown, v)
		case []byte:
			shown = append(shown, summary(v))
		default:
			shown = append(shown, fmt.Sprint(v))
		}
	}
	fmt.Fprintf(&h.log, "%s\n", strings.Join(shown, " "))
	reply, err := h.conn.Do(context.Background(), send...)
	var refused *resp.Error
	switch {
	case errors.As(err, &refused):
		text := refused.Code
		if text != "ERR" {
			text += " " + strings.ReplaceAll(refused.Message, h.key(""), "@")
		}
		fmt.Fprintf(&h.log, "  -%s\n", text)
	case err != nil:
		h.t.Fatalf("%s: %v", shown, err)
	default:
		versions := map[string]bool{"TENSOR.SET": true, "TENSOR.GET": true, "TENSOR.RANGE": true, "TENSOR.WAIT": true, "TENSOR.META": true}[fmt.Sprint(args[0])]
		h.show(reply, 1, versions)
	}
}

// version returns that of a tensor.
func (h *host) version(name string) int64 {
	h.t.Helper()
	r, err := h.conn.Do(context.Background(), "TENSOR.META", h.key(name))
	if err != nil {
		h.t.Fatal(err)
	}
	return r.Elems[5].Int
}

// show writes a reply. A number that may be a version, and is too large for
// anything else, is left out.
func (h *host) show(r resp.Reply, depth int, versions bool) {
	indent := strings.Repeat("  ", depth)
	switch r.Kind {
	case resp.Nil:
		fmt.Fprintf(&h.log, "%snil\n", indent)
	case resp.Simple:
		fmt.Fprintf(&h.log, "%s%s\n", indent, r.Bytes)
	case resp.Int:
		if versions && r.Int > 1<<40 {
			fmt.Fprintf(&h.log, "%sversion\n", indent)
		} else {
			fmt.Fprintf(&h.log, "%s%d\n", indent, r.Int)
		}
	case resp.Bulk:
		fmt.Fprintf(&h.log, "%s%s\n", indent, summary(bytes.ReplaceAll(r.Bytes, []byte(h.key("")), []byte("@"))))
	case resp.Array:
		fmt.Fprintf(&h.log, "%s[%d]\n", indent, len(r.Elems))
		for _, e := range r.Elems {
			h.show(e, depth+1, versions)
		}
	}
}

// summary shows text as it is, few bytes in hexadecimal, and more by their
// hash.
func summary(b []byte) string {
	printable := true
	for _, c := range b {
		printable = printable && c >= ' ' && c <= '~'
	}
	switch {
	case printable && len(b) <= 80:
		return fmt.Sprintf("%q", b)
	case len(b) <= 32:
		return "0x" + hex.EncodeToString(b)
	}
	return fmt.Sprintf("%d bytes %s", len(b), treehash.Sum(b).Short())
}

func float32s(n int, f func(i int) float32) []byte {
	v := make([]float32, n)
	for i := range v {
		v[i] = f(i)
	}
	return tensor.Bytes(v)
}

// conform sends all commands and returns what was answered.
func conform(t *testing.T, conn *resp.Conn, prefix string) string {
	h := &host{t: t, conn: conn, key: func(name string) string { return prefix + name }}
	rng := rand.New(rand.NewPCG(1, 2))
	random := func(n int) []byte {
		return float32s(n, func(int) float32 { return float32(rng.NormFloat64()) })
	}
	note := func(text string) { fmt.Fprintf(&h.log, "\n# %s\n", text) }
	set := func(key string, data []byte) { h.do("TENSOR.SET", key, "float32", 1, len(data)/4, data) }

	note("tensors")
	for _, dtype := range []string{"float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool"} {
		d, err := tensor.ParseDType(dtype)
		if err != nil {
			t.Fatal(err)
		}
		data := make([]byte, 6*d.Size())
		for i := range data {
			data[i] = byte(i % 2)
		}
		h.do("TENSOR.SET", "@"+dtype, dtype, 2, 2, 3, data)
		h.do("TENSOR.GET", "@"+dtype)
		h.do("TENSOR.META", "@"+dtype)
	}
	h.do("TENSOR.SET", "@scalar", "float32", 0, float32s(1, func(int) float32 { return 7 }))
	h.do("TENSOR.GET", "@scalar")
	h.do("TENSOR.SET", "@empty", "float32", 2, 0, 3, []byte{})
	h.do("TENSOR.GET", "@empty")
	h.do("TENSOR.GET", "@none")
	h.do("TENSOR.SET", "@x", "float32", 1, 3, make([]byte, 11))
	h.do("TENSOR.SET", "@x", "float31", 1, 3, make([]byte, 12))
	h.do("TENSOR.SET", "@x", "float32", 2, 3, make([]byte, 12))
	h.do("TENSOR.SET", "@x", "float32", 1, -3, make([]byte, 12))
	h.do("TENSOR.SET", "@x", "float32", 2, 1<<40, 1<<40, make([]byte, 12))
	h.do("EXISTS", "@x")
	h.do("TENSOR.SET", "@m", "int32", 2, 4, 2, random(8))
	h.do("TENSOR.ROWS", "@m", 3, 0, 0)
	h.do("TENSOR.ROWS", "@m", 4)
	h.do("TENSOR.ROWS", "@scalar", 0)
	h.do("TENSOR.RANGE", "@m", 8, 8)
	h.do("TENSOR.RANGE", "@m", 28, 100)
	h.do("TENSOR.RANGE", "@m", 100, 1)
	h.do("TENSOR.SLICE", "@s", "@m", 1, 3)
	h.do("TENSOR.GET", "@s")
	h.do("TENSOR.SLICE", "@s", "@m", 3, 5)
	set("@big", random(300_000))
	h.do("TENSOR.HASH", "@big")
	h.do("TENSOR.COPY", "@copy", "@big")
	h.do("TENSOR.HASH", "@copy")
	h.do("TENSOR.RENAME", "@moved", "@copy")
	h.do("EXISTS", "@copy", "@moved")
	h.do("TENSOR.RENAME", "@moved", "@none")
	h.do("TENSOR.DEL", "@moved", "@none")
	h.do("TENSOR.STEP", "@big", 5)
	h.do("TENSOR.KIND", "@big", "gradient")
	h.do("TENSOR.META", "@big")
	h.do("TENSOR.KIND", "@big", "PARAMETER")
	h.do("TENSOR.WAIT", "@big", 0, 1000)
	h.do("TENSOR.WAIT", "@none", 0, 1)

	note("casts")
	set("@f", float32s(12, func(i int) float32 {
		return []float32{0, -0.5, 1.5, 2.5, 65504, 65520, 1e30, -1e30, float32(math.Inf(1)), float32(math.NaN()), 255.9, -129}[i]
	}))
	for _, dtype := range []string{"float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool"} {
		h.do("TENSOR.CAST", "@"+dtype, "@f", dtype)
		h.do("TENSOR.GET", "@"+dtype)
		h.do("TENSOR.CAST", "@back", "@"+dtype, "float32")
		h.do("TENSOR.GET", "@back")
	}

	note("averages")
	const n = 20_003
	h.do("TENSOR.ACCUMULATOR", "@acc", n, 5, 2)
	h.do("TENSOR.ACCUMULATE", "@acc", 1, random(n))
	h.do("TENSOR.ACCUMULATE", "@acc", 4, random(n))
	h.do("TENSOR.ACCUMULATE", "@acc", 0, random(n))
	h.do("TENSOR.ACCUMULATE", "@acc", 0, random(n))
	h.do("TENSOR.ACCUMULATE", "@acc", 2, random(n-1))
	h.do("TENSOR.ACCUMULATE", "@acc", 2, float32s(n, func(i int) float32 {
		if i == 9_000 {
			return float32(math.NaN())
		}
		return 1
	}))
	h.do("TENSOR.AVERAGE", "@avg", "@acc")
	h.do("TENSOR.SKIP", "@acc", 2)
	h.do("TENSOR.ACCUMULATE", "@acc", 2, random(n))
	h.do("TENSOR.ACCUMULATE", "@acc", 3, random(n))
	h.do("TENSOR.ACCUMULATE", "@acc", 4, random(n))
	h.do("TENSOR.AVERAGE", "@avg", "@acc")
	h.do("TENSOR.META", "@avg")
	h.do("TENSOR.HASH", "@avg")
	h.do("TENSOR.DEL", "@acc")
	h.do("TENSOR.AVERAGE", "@avg", "@acc")
	var keys, weighted []any
	for i := range 25 {
		key := fmt.Sprintf("@g%d", i)
		set(key, random(n))
		keys, weighted = append(keys, key), append(weighted, 1+i%3, key)
	}
	for _, count := range []int{1, 2, 3, 7, 8, 9, 16, 17, 25} {
		h.do(append([]any{"TENSOR.MEAN", "@mean"}, keys[:count]...)...)
		h.do("TENSOR.HASH", "@mean")
		h.do(append([]any{"TENSOR.WMEAN", "@mean"}, weighted[:2*count]...)...)
		h.do("TENSOR.HASH", "@mean")
		h.do(append([]any{"TENSOR.SUM", "@sum"}, keys[:count]...)...)
		h.do("TENSOR.HASH", "@sum")
		h.do(append([]any{"TENSOR.MEDIAN", "@median"}, keys[:count]...)...)
		h.do("TENSOR.HASH", "@median")
		h.do(append([]any{"TENSOR.TRIMMEDMEAN", (count - 1) / 3, "@trimmed"}, keys[:count]...)...)
		h.do("TENSOR.HASH", "@trimmed")
	}
	h.do("TENSOR.TRIMMEDMEAN", 1, "@trimmed", "@g0", "@g1")
	h.do("TENSOR.MEAN", "@mean", "@g0", "@big")
	h.do("TENSOR.MEAN", "@mean", "@g0", "@none")
	h.do("TENSOR.MEAN", "@mean", "@m", "@m")
	h.do("TENSOR.WMEAN", "@mean", 0, "@g0")
	h.do("TENSOR.CAST", "@h0", "@g0", "float16")
	h.do("TENSOR.CAST", "@h1", "@g1", "float16")
	h.do("TENSOR.CAST", "@h2", "@g2", "float16")
	for _, command := range []string{"TENSOR.MEAN", "TENSOR.SUM", "TENSOR.MEDIAN"} {
		h.do(command, "@halves", "@h0", "@h1", "@h2")
		h.do("TENSOR.HASH", "@halves")
	}
	set("@nan", float32s(n, func(i int) float32 {
		if i == 12_345 {
			return float32(math.Inf(-1))
		}
		return 0
	}))
	for _, command := range []string{"TENSOR.MEAN", "TENSOR.SUM", "TENSOR.MEDIAN"} {
		h.do(command, "@kept", "@g0", "@nan", "@g1")
	}
	h.do("EXISTS", "@kept")

	note("arithmetic")
	h.do("TENSOR.SCALE", "@scaled", "0.1", "@g0")
	h.do("TENSOR.HASH", "@scaled")
	h.do("TENSOR.AXPY", "@sum", "@g0", "@g1", "-2.5")
	h.do("TENSOR.HASH", "@sum")
	h.do("TENSOR.AXPY", "@g1", "@g0", "@g1", "0.5")
	h.do("TENSOR.HASH", "@g1")
	h.do("TENSOR.NORM", "@g0")
	h.do("TENSOR.DOT", "@g0", "@g1")
	h.do("TENSOR.COSINE", "@g0", "@g1")
	h.do("TENSOR.DOT", "@g0", "@big")
	h.do("TENSOR.NORM", "@big")
	h.do("TENSOR.NORM", "@nan")
	h.do("TENSOR.CLIP", "@clipped", "@g0", "1")
	h.do("TENSOR.NORM", "@clipped")
	h.do("TENSOR.HASH", "@clipped")
	h.do("TENSOR.CLIP", "@clipped", "@g0", "1e9")
	h.do("TENSOR.HASH", "@clipped")
	h.do("TENSOR.CLIP", "@clipped", "@g0", "-1")
	h.do("TENSOR.SCALE", "@scaled", "nan", "@g0")
	h.do("TENSOR.SCALE", "@scaled", "3e38", "@g0")
	h.do("TENSOR.QUANTISE", "@q", "@g0")
	h.do("TENSOR.HASH", "@q")
	h.do("TENSOR.DEQUANTISE", "@dq", "@q", n)
	h.do("TENSOR.HASH", "@dq")
	h.do("TENSOR.DEQUANTISE", "@dq", "@q", 5)
	h.do("TENSOR.QUANTISE", "@q", "@nan")

	note("updates")
	for i, o := range [][]any{
		{"SGD", "LR", "0.1"}, {"SGD", "LR", "0.1", "MOMENTUM", "0.9", "WEIGHTDECAY", "0.01"}, {"sgd", "lr", "0.1", "momentum", "0.9", "nesterov"},
		{"ADAM", "LR", "0.01"}, {"ADAMW", "LR", "0.01", "WEIGHTDECAY", "0.1"}, {"RMSPROP", "LR", "0.01"}, {"RMSPROP", "LR", "0.01", "MOMENTUM", "0.5"},
		{"ADAGRAD", "LR", "0.1"}, {"ADAM", "LR", "0.01", "WARMUP", "2", "SCHEDULE", "COSINE", "10"},
	} {
		p, s := fmt.Sprintf("@p%d", i), fmt.Sprintf("@s%d", i)
		h.do("TENSOR.COPY", p, "@g2")
		for step := 1; step <= 4; step++ {
			h.do(append([]any{"TENSOR.UPDATE", p, s, fmt.Sprintf("@g%d", 2+step), "STEP", step}, o...)...)
		}
		h.do(append([]any{"TENSOR.UPDATE", p, s, "@g2", "STEP", 4}, o...)...)
		h.do(append([]any{"TENSOR.UPDATE", p, s, "@g2", "STEP", 6}, o...)...)
		h.do("TENSOR.HASH", p)
		h.do("TENSOR.HASH", s)
		h.do(append([]any{"TENSOR.UPDATEINTO", "@newp", "@news", p, s, "@g9", "STEP", 5}, o...)...)
		h.do(append([]any{"TENSOR.UPDATEINTO", "@newp", "@news", p, s, "@g9", "STEP", 5}, o...)...)
		h.do("TENSOR.HASH", "@newp")
		h.do("TENSOR.META", "@news")
		h.do("TENSOR.HASH", p)
		h.do("TENSOR.DEL", "@newp", "@news")
	}
	h.do("TENSOR.UPDATE", "@p0", "@s0", "@big", "STEP", 5, "SGD", "LR", "0.1")
	h.do("TENSOR.UPDATE", "@p0", "@s0", "@none", "STEP", 5, "SGD", "LR", "0.1")
	h.do("TENSOR.UPDATE", "@p0", "@p0", "@g0", "STEP", 1, "SGD", "LR", "0.1")
	h.do("TENSOR.UPDATE", "@p0", "@s0", "@g0", "STEP", 5, "SGD", "LR", "-1")
	h.do("TENSOR.UPDATE", "@p0", "@s0", "@g0", "STEP", 5, "NADAM", "LR", "1")
	h.do("TENSOR.HASH", "@p0")

	note("expiry")
	version := h.version("g0")
	h.do("PEXPIRE", "@g0", 1)
	if r, err := conn.Do(context.Background(), "TENSOR.WAIT", h.key("g0"), strconv.FormatInt(version, 10), 10_000); err != nil || r.Kind != resp.Int || r.Int != 0 {
		t.Fatalf("waiting for a tensor that expires: %+v, %v", r, err)
	}
	h.do("EXISTS", "@g0")
	h.do("EXPIRE", "@g1", 1000)
	h.do("TTL", "@g1")
	h.do("PERSIST", "@g1")
	h.do("TTL", "@g1")
	h.do("TTL", "@none")
	h.do("EXPIRE", "@g1", 1000)
	h.do("TENSOR.SCALE", "@g1", "2", "@g1")
	h.do("TTL", "@g1")
	return h.log.String()
}

// conforms compares what a host answered with the golden file.
func conforms(t *testing.T, got string) {
	t.Helper()
	if *updateGolden {
		if err := os.WriteFile(conformanceGolden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(conformanceGolden)
	if err != nil {
		t.Fatal(err)
	}
	g, w := strings.Split(got, "\n"), strings.Split(string(want), "\n")
	last := ""
	for i := range max(len(g), len(w)) {
		a, b := "", ""
		if i < len(g) {
			a = g[i]
		}
		if i < len(w) {
			b = w[i]
		}
		if a != b {
			t.Fatalf("line %d, after %s:\n got  %s\n want %s", i+1, last, a, b)
		}
		if !strings.HasPrefix(a, " ") {
			last = a
		}
	}
}

func TestConformanceInMemory(t *testing.T) {
	db, err := tensordb.Open(tensordb.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	s := tensordb.NewServer(db, tensordb.ServerConfig{Open: true})
	defer s.Close()
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(ln)
	conn, err := resp.Dial(t.Context(), "unix", ln.Addr().String(), resp.DialOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conforms(t, conform(t, conn, "{job:1}:"))
}
