// Command db measures the tensor database beside what it replaces, all in one
// run: averages and updates where the tensors lie, in this program's own server
// and in a Redis server with the module, against fetching them from a stock
// Redis server, computing and storing them back, and against a Lua script over
// JSON in it. Everything goes over Unix sockets. Run it by `make bench-db` on a
// machine that does nothing else.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spirt-ml/spirt/internal/kernel"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensor"
	"github.com/spirt-ml/spirt/tensordb"
)

func main() {
	module := flag.String("module", "spirt.so", "the Redis module; empty: without")
	repeats := flag.Int("repeats", 5, "how often each thing is done; the median counts")
	quick := flag.Bool("quick", false, "small tensors only, to see that all works")
	flag.Parse()
	if err := run(*module, *repeats, *quick); err != nil {
		fmt.Fprintln(os.Stderr, "bench db:", err)
		os.Exit(1)
	}
}

// bench is one run: three hosts, and where results go.
type bench struct {
	repeats int
	hosts   []*host // ours, and Redis with the module if there is one
	stock   *resp.Conn
	socket  string // of the stock server
}

type host struct {
	name, socket string
	conn         *resp.Conn
}

func run(module string, repeats int, quick bool) error {
	dir, err := os.MkdirTemp("", "spirt-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &bench{repeats: repeats}

	db, err := tensordb.Open(tensordb.Config{})
	if err != nil {
		return err
	}
	defer db.Close()
	server := tensordb.NewServer(db, tensordb.ServerConfig{Open: true})
	defer server.Close()
	own := filepath.Join(dir, "own.sock")
	ln, err := net.Listen("unix", own)
	if err != nil {
		return err
	}
	go server.Serve(ln) // ends with the server's Close
	if err := b.add("in memory", own); err != nil {
		return err
	}
	if module != "" {
		if module, err = filepath.Abs(module); err != nil {
			return err
		}
		socket, stop, err := redis(filepath.Join(dir, "module"), "--loadmodule", module)
		if err != nil {
			return err
		}
		defer stop()
		if err := b.add("Redis with the module", socket); err != nil {
			return err
		}
	}
	socket, stop, err := redis(filepath.Join(dir, "stock"))
	if err != nil {
		return err
	}
	defer stop()
	b.socket = socket
	if b.stock, err = dial(socket); err != nil {
		return err
	}
	sizes := []int{1_000_000, 2_500_000, 11_200_000}
	if quick {
		sizes = []int{100_000}
	}
	fmt.Printf("%s, %d CPUs, %s; Redis %s; median of %d\n\n", cpu(), runtime.NumCPU(), runtime.Version(), version(b.stock), repeats)
	fmt.Println("| Work | floats | M | host | ms | of read bandwidth | against | ms | times faster |")
	fmt.Println("|---|---:|---:|---|---:|---:|---|---:|---:|")
	for _, n := range sizes {
		for _, m := range []int{8, 24} {
			if err := b.averages(n, m); err != nil {
				return err
			}
		}
		if err := b.updates(n); err != nil {
			return err
		}
		if err := b.sets(n); err != nil {
			return err
		}
	}
	return b.pings(sizes[len(sizes)-1])
}

func (b *bench) add(name, socket string) error {
	conn, err := dial(socket)
	if err != nil {
		return err
	}
	b.hosts = append(b.hosts, &host{name, socket, conn})
	return nil
}

func dial(socket string) (*resp.Conn, error) {
	return resp.Dial(context.Background(), "unix", socket, resp.DialOptions{Timeout: 10 * time.Minute, Limits: resp.Limits{MaxBulk: 1 << 30}})
}

// redis starts a server that keeps nothing, and returns its socket.
func redis(dir string, args ...string) (socket string, stop func(), err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", nil, err
	}
	socket = filepath.Join(dir, "s")
	cmd := exec.Command("redis-server", append([]string{"--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", dir, "--logfile", filepath.Join(dir, "log"), "--proto-max-bulk-len", "1gb"}, args...)...)
	if err := cmd.Start(); err != nil {
		return "", nil, fmt.Errorf("starting redis-server (Debian's package redis-server has it): %w", err)
	}
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	for range 500 {
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			return socket, stop, nil
		}
		time.Sleep(10 * time.Millisecond) // it tells nobody when it listens
	}
	stop()
	log, _ := os.ReadFile(filepath.Join(dir, "log"))
	return "", nil, fmt.Errorf("redis-server does not listen: %s", log)
}

func cpu() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(line, "model name\t: "); ok {
			return strings.TrimSpace(name)
		}
	}
	return runtime.GOARCH
}

func version(c *resp.Conn) string {
	r, err := c.Do(context.Background(), "INFO", "server")
	if err != nil {
		return "?"
	}
	for line := range strings.Lines(string(r.Bytes)) {
		if v, ok := strings.CutPrefix(line, "redis_version:"); ok {
			return strings.TrimSpace(v)
		}
	}
	return "?"
}

// warmUp is how often a thing is done before it counts: by then memory is there
// that is used again.
const warmUp = 3

// median returns the median time of f, after some calls that are not counted.
func (b *bench) median(f func() error) (float64, error) {
	var times []float64
	for i := range b.repeats + warmUp {
		start := time.Now()
		if err := f(); err != nil {
			return 0, err
		}
		if i >= warmUp {
			times = append(times, time.Since(start).Seconds()*1e3)
		}
	}
	slices.Sort(times)
	return times[len(times)/2], nil
}

func random(n int, seed uint64) []float32 {
	rng := rand.New(rand.NewPCG(seed, 1))
	v := make([]float32, n)
	for i := range v {
		v[i] = rng.Float32() - 0.5
	}
	return v
}

// row prints one line of the table. read is how long it takes to read what the
// work reads, 0 where that is no measure.
func row(work string, n, m int, host string, ms, read float64, against string, other float64) {
	share, factor, slower := "", "", ""
	if read > 0 {
		share = fmt.Sprintf("%.0f %%", 100*read/ms)
	}
	if other > 0 {
		factor, slower = fmt.Sprintf("%.1f", other/ms), fmt.Sprintf("%.1f", other)
	}
	count := ""
	if m > 0 {
		count = fmt.Sprint(m)
	}
	fmt.Printf("| %s | %.1f M | %s | %s | %.2f | %s | %s | %s | %s |\n", work, float64(n)/1e6, count, host, ms, share, against, slower, factor)
}

func do(c *resp.Conn, args ...any) error {
	_, err := c.Do(context.Background(), args...)
	return err
}

func key(i int) string { return fmt.Sprintf("{bench}:g%d", i) }

// averages measures the mean and the median of m tensors of n floats, and
// gradients that arrive one by one.
func (b *bench) averages(n, m int) error {
	vectors := make([][]float32, m)
	for i := range vectors {
		vectors[i] = random(n, uint64(i))
	}
	sink := 0.0
	read, err := b.median(func() error {
		for _, v := range vectors {
			sink += kernel.Sum(v)
		}
		return nil
	})
	if err != nil {
		return err
	}
	row("read", n, m, "one thread", read, read, "", 0)

	for i, v := range vectors {
		if err := do(b.stock, "SET", key(i), tensor.Bytes(v)); err != nil {
			return err
		}
	}
	fetched, mean := make([][]float32, m), make([]float32, n)
	for i := range fetched {
		fetched[i] = make([]float32, n)
	}
	fetch, err := b.median(func() error {
		for i, f := range fetched {
			r, err := b.stock.DoInto(context.Background(), tensor.Bytes(f), "GET", key(i))
			if err != nil {
				return err
			}
			fetched[i] = tensor.Floats(r.Bytes)
		}
		kernel.Mean(mean, fetched)
		return do(b.stock, "SET", "{bench}:mean", tensor.Bytes(mean))
	})
	if err != nil {
		return err
	}
	lua, err := b.lua(n, m)
	if err != nil {
		return err
	}
	for _, h := range b.hosts {
		args := []any{"TENSOR.MEAN", "{bench}:mean"}
		for i, v := range vectors {
			if err := do(h.conn, "TENSOR.SET", key(i), "float32", 1, n, tensor.Bytes(v)); err != nil {
				return err
			}
			args = append(args, key(i))
		}
		ms, err := b.median(func() error { return do(h.conn, args...) })
		if err != nil {
			return err
		}
		row("mean of stored keys", n, m, h.name, ms, read, "fetch, average, store", fetch)
		row("", n, m, h.name, ms, 0, "Lua over JSON, extrapolated", lua)
		args[0] = "TENSOR.MEDIAN"
		if ms, err = b.median(func() error { return do(h.conn, args...) }); err != nil {
			return err
		}
		row("median of stored keys", n, m, h.name, ms, read, "", 0)

		round := 0
		if ms, err = b.median(func() error {
			round++
			acc := fmt.Sprintf("{bench}:acc%d", round)
			if err := do(h.conn, "TENSOR.ACCUMULATOR", acc, n, m, 2); err != nil {
				return err
			}
			for i, v := range vectors {
				if err := do(h.conn, "TENSOR.ACCUMULATE", acc, i, tensor.Bytes(v)); err != nil {
					return err
				}
			}
			return errors.Join(do(h.conn, "TENSOR.AVERAGE", "{bench}:mean", acc), do(h.conn, "TENSOR.DEL", acc))
		}); err != nil {
			return err
		}
		row("accumulate on arrival, with the transfer", n, m, h.name, ms, read, "fetch, average, store (without the transfer there)", fetch)
		if err := cleanUp(h.conn, m); err != nil {
			return err
		}
	}
	if err := do(b.stock, "FLUSHALL"); err != nil {
		return err
	}
	if sink == 0.12345 { // so that reading is not left out
		fmt.Println()
	}
	return nil
}

func cleanUp(c *resp.Conn, m int) error {
	args := []any{"TENSOR.DEL", "{bench}:mean"}
	for i := range m {
		args = append(args, key(i))
	}
	return do(c, args...)
}

// luaMean averages vectors that are JSON arrays, as the authors of SPIRT did.
const luaMean = `local sum
for i = 1, #KEYS - 1 do
  local v = cjson.decode(redis.call('GET', KEYS[i]))
  if not sum then sum = v else for j = 1, #v do sum[j] = sum[j] + v[j] end end
end
for j = 1, #sum do sum[j] = sum[j] / (#KEYS - 1) end
redis.call('SET', KEYS[#KEYS], cjson.encode(sum))
return #sum`

// lua measures that on luaFloats floats and extrapolates to n.
func (b *bench) lua(n, m int) (float64, error) {
	const luaFloats = 50_000
	args := []any{"EVAL", luaMean, m + 1}
	for i := range m {
		var text strings.Builder
		text.WriteByte('[')
		for j, x := range random(luaFloats, uint64(i)) {
			if j > 0 {
				text.WriteByte(',')
			}
			fmt.Fprintf(&text, "%.9g", x)
		}
		text.WriteByte(']')
		name := fmt.Sprintf("{bench}:json%d", i)
		if err := do(b.stock, "SET", name, text.String()); err != nil {
			return 0, err
		}
		args = append(args, name)
	}
	args = append(args, "{bench}:jsonmean")
	repeats := b.repeats
	b.repeats = min(repeats, 3)
	defer func() { b.repeats = repeats }()
	ms, err := b.median(func() error { return do(b.stock, args...) })
	return ms * float64(n) / luaFloats, err
}

// updates measures one step of an optimizer on n parameters.
func (b *bench) updates(n int) error {
	for _, o := range []optim.Config{{Name: "sgd", LR: 0.1}, {Name: "adam", LR: 0.001}} {
		params, grad, state := random(n, 1), random(n, 2), make([]float32, o.StateLen(n))
		for name, v := range map[string][]float32{"p": params, "g": grad, "s": state} {
			if err := do(b.stock, "SET", "{bench}:"+name, tensor.Bytes(v)); err != nil {
				return err
			}
		}
		step := uint64(0)
		fetch, err := b.median(func() error {
			step++
			for name, v := range map[string][]float32{"p": params, "g": grad, "s": state} {
				if len(v) == 0 {
					continue
				}
				if _, err := b.stock.DoInto(context.Background(), tensor.Bytes(v), "GET", "{bench}:"+name); err != nil {
					return err
				}
			}
			o.Step(params, state, params, state, grad, step)
			if len(state) > 0 {
				if err := do(b.stock, "SET", "{bench}:s", tensor.Bytes(state)); err != nil {
					return err
				}
			}
			return do(b.stock, "SET", "{bench}:p", tensor.Bytes(params))
		})
		if err != nil {
			return err
		}
		for _, h := range b.hosts {
			for name, v := range map[string][]float32{"p": params, "g": grad} {
				if err := do(h.conn, "TENSOR.SET", "{bench}:"+name, "float32", 1, n, tensor.Bytes(v)); err != nil {
					return err
				}
			}
			step := 0
			ms, err := b.median(func() error {
				step++
				args := []any{"TENSOR.UPDATE", "{bench}:p", "{bench}:s", "{bench}:g", "STEP", step}
				for _, word := range o.Args() {
					args = append(args, word)
				}
				return do(h.conn, args...)
			})
			if err != nil {
				return err
			}
			row(strings.ToUpper(o.Name)+" step", n, 0, h.name, ms, 0, "fetch, update, store", fetch)
			if err := do(h.conn, "TENSOR.DEL", "{bench}:p", "{bench}:s", "{bench}:g"); err != nil {
				return err
			}
		}
		if err := do(b.stock, "FLUSHALL"); err != nil {
			return err
		}
	}
	return nil
}

// sets measures storing and reading one tensor of n floats.
func (b *bench) sets(n int) error {
	v := tensor.Bytes(random(n, 1))
	into := make([]byte, len(v))
	stockSet, err := b.median(func() error { return do(b.stock, "SET", "{bench}:x", v) })
	if err != nil {
		return err
	}
	stockGet, err := b.median(func() error {
		_, err := b.stock.DoInto(context.Background(), into, "GET", "{bench}:x")
		return err
	})
	if err != nil {
		return err
	}
	for _, h := range b.hosts {
		ms, err := b.median(func() error { return do(h.conn, "TENSOR.SET", "{bench}:x", "float32", 1, n, v) })
		if err != nil {
			return err
		}
		row("TENSOR.SET", n, 0, h.name, ms, 0, "SET in stock Redis", stockSet)
		if ms, err = b.median(func() error {
			_, err := h.conn.DoInto(context.Background(), into, "TENSOR.GET", "{bench}:x")
			return err
		}); err != nil {
			return err
		}
		row("TENSOR.GET", n, 0, h.name, ms, 0, "GET in stock Redis", stockGet)
		if err := do(h.conn, "TENSOR.DEL", "{bench}:x"); err != nil {
			return err
		}
	}
	return do(b.stock, "FLUSHALL")
}

// pings measures how long PING takes on another connection while the mean of 24
// tensors of n floats is computed, again and again.
func (b *bench) pings(n int) error {
	const m = 24
	fmt.Printf("\nPING on another connection while the mean of %d x %.1f M is computed:\n\n| host | pings | p50 ms | p99 ms | max ms |\n|---|---:|---:|---:|---:|\n", m, float64(n)/1e6)
	for _, h := range b.hosts {
		args := []any{"TENSOR.MEAN", "{bench}:mean"}
		v := tensor.Bytes(random(n, 1))
		for i := range m {
			if err := do(h.conn, "TENSOR.SET", key(i), "float32", 1, n, v); err != nil {
				return err
			}
			args = append(args, key(i))
		}
		other, err := dial(h.socket)
		if err != nil {
			return err
		}
		done := make(chan error, 1)
		go func() {
			var err error
			for i := 0; i < 4*b.repeats && err == nil; i++ {
				err = do(h.conn, args...)
			}
			done <- err
		}()
		var times []float64
		for ended := false; !ended; {
			select {
			case err := <-done:
				if err != nil {
					return err
				}
				ended = true
			default:
				start := time.Now()
				if err := do(other, "PING"); err != nil {
					return err
				}
				times = append(times, time.Since(start).Seconds()*1e3)
				time.Sleep(200 * time.Microsecond) // a client that does other things too
			}
		}
		slices.Sort(times)
		fmt.Printf("| %s | %d | %.3f | %.3f | %.3f |\n", h.name, len(times), times[len(times)/2], times[len(times)*99/100], times[len(times)-1])
		if err := errors.Join(other.Close(), cleanUp(h.conn, m)); err != nil {
			return err
		}
	}
	return nil
}
