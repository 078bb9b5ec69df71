package tensordb

import (
	"fmt"
	"testing"

	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensor"
)

// The sizes are LeNet-5's 61,706 parameters and the 11.2 million of ResNet-18.
const (
	lenet  = 61_706
	resnet = 11_200_000
)

func sizes(b *testing.B) []int {
	if testing.Short() {
		return []int{lenet}
	}
	return []int{lenet, resnet}
}

func mustDo(b *testing.B, c *resp.Conn, args ...any) resp.Reply {
	r, err := c.Do(b.Context(), args...)
	if err != nil {
		b.Fatal(err)
	}
	return r
}

// BenchmarkAccumulateOverRESP pushes one gradient after the other through the
// Unix socket into the running sum.
func BenchmarkAccumulateOverRESP(b *testing.B) {
	for _, n := range sizes(b) {
		b.Run(fmt.Sprintf("%dKB", 4*n/1000), func(b *testing.B) {
			_, socket := startServer(b, Config{}, ServerConfig{})
			c := dial(b, socket, adminToken)
			gradient := tensor.Bytes(constant(n, 1))
			minibatch := maxMinibatches
			b.SetBytes(int64(4 * n))
			b.ReportAllocs()
			for b.Loop() {
				if minibatch == maxMinibatches {
					mustDo(b, c, "TENSOR.ACCUMULATOR", "acc", n, maxMinibatches, 0)
					minibatch = 0
				}
				mustDo(b, c, "TENSOR.ACCUMULATE", "acc", minibatch, gradient)
				minibatch++
			}
		})
	}
}

// BenchmarkAverage24OverRESP is the work that the design measured: 24
// gradients arrive over the socket and are averaged.
func BenchmarkAverage24OverRESP(b *testing.B) {
	const minibatches = 24
	for _, n := range sizes(b) {
		b.Run(fmt.Sprintf("%dKB", 4*n/1000), func(b *testing.B) {
			_, socket := startServer(b, Config{}, ServerConfig{})
			c := dial(b, socket, adminToken)
			gradient := tensor.Bytes(constant(n, 1))
			b.SetBytes(int64(4 * n * minibatches))
			for b.Loop() {
				mustDo(b, c, "TENSOR.ACCUMULATOR", "acc", n, minibatches, 0)
				for i := range minibatches {
					mustDo(b, c, "TENSOR.ACCUMULATE", "acc", i, gradient)
				}
				mustDo(b, c, "TENSOR.AVERAGE", "average", "acc")
			}
		})
	}
}

// BenchmarkMean24 averages 24 tensors that are in the database.
func BenchmarkMean24(b *testing.B) {
	for _, n := range sizes(b) {
		b.Run(fmt.Sprintf("%dKB", 4*n/1000), func(b *testing.B) {
			db := open(b, Config{})
			var keys []string
			for i := range 24 {
				keys = append(keys, fmt.Sprint(i))
				set(b, db, keys[i], constant(n, float32(i)))
			}
			b.SetBytes(int64(4 * n * len(keys)))
			for b.Loop() {
				if err := db.Mean("mean", keys, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkAdamUpdate applies a gradient in the database.
func BenchmarkAdamUpdate(b *testing.B) {
	for _, n := range sizes(b) {
		b.Run(fmt.Sprintf("%dKB", 4*n/1000), func(b *testing.B) {
			db := open(b, Config{})
			set(b, db, "p", constant(n, 0))
			set(b, db, "g", constant(n, 1))
			step := uint64(0)
			b.SetBytes(int64(4 * n))
			for b.Loop() {
				step++
				if _, err := db.Update(UpdateKeys{Params: "p", State: "s", Gradient: "g"}, step, optim.Config{Name: "adam", LR: 0.001}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkSet45MB stores 45 MB through the Unix socket.
func BenchmarkSet45MB(b *testing.B) {
	n := resnet
	if testing.Short() {
		n = lenet
	}
	_, socket := startServer(b, Config{}, ServerConfig{})
	c := dial(b, socket, adminToken)
	data := tensor.Bytes(constant(n, 1))
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		mustDo(b, c, "TENSOR.SET", "x", "float32", 1, n, data)
	}
}

// BenchmarkGet45MB reads 45 MB through the Unix socket into one's own memory.
func BenchmarkGet45MB(b *testing.B) {
	n := resnet
	if testing.Short() {
		n = lenet
	}
	db, socket := startServer(b, Config{}, ServerConfig{})
	c := dial(b, socket, readToken)
	set(b, db, testPrefix+"x", constant(n, 1))
	dst := make([]byte, 4*n)
	b.SetBytes(int64(len(dst)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.DoInto(b.Context(), dst, "TENSOR.GET", testPrefix+"x"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCheckpoint45MB(b *testing.B) {
	n := resnet
	if testing.Short() {
		n = lenet
	}
	db := open(b, Config{Dir: b.TempDir()})
	set(b, db, "x", constant(n, 1))
	b.SetBytes(int64(4 * n))
	for b.Loop() {
		if err := db.Checkpoint("bench", []string{"x"}, nil); err != nil {
			b.Fatal(err)
		}
	}
}
