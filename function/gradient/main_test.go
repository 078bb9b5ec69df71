package gradient

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/tensor"
	"github.com/spirt-ml/spirt/tensordb"
)

// The test binary is the function too, when it is started with a Runtime API in its environment.
func TestMain(m *testing.M) {
	if os.Getenv("AWS_LAMBDA_RUNTIME_API") != "" {
		os.Exit(Main())
	}
	os.Exit(m.Run())
}

const (
	secret = "a token of a function"
	prefix = "{job:0}:"
)

// peer is what a function finds: a database with parameters and samples.
type peer struct {
	db     *tensordb.DB
	server *tensordb.Server
	socket string
	spec   nn.Spec
	model  *nn.Model
	params []float32
	images []byte
	labels []byte
	event  Event // without task, rows, minibatch and accumulate
}

const samples = 500

func newPeer(t testing.TB, name string) *peer {
	t.Helper()
	spec, err := nn.Builtin(name)
	check(t, err)
	model, err := nn.New(spec)
	check(t, err)
	db, err := tensordb.Open(tensordb.Config{})
	check(t, err)
	p := &peer{db: db, spec: spec, model: model, params: make([]float32, model.NumParams())}
	t.Cleanup(func() { db.Close() })
	model.Init(p.params, 1)
	// Pixels and labels need be nothing but the same each time.
	p.images = make([]byte, samples*model.InputLen())
	state := uint32(1)
	for i := range p.images {
		state = state*1664525 + 1013904223
		p.images[i] = byte(state >> 24)
	}
	p.labels = make([]byte, samples)
	for i := range p.labels {
		p.labels[i] = byte(i * 7 % spec.Classes)
	}
	version, err := db.Set(prefix+"parameters", tensor.FromFloats([]int{len(p.params)}, p.params))
	check(t, err)
	_, err = db.Set(prefix+"images", tensor.Tensor{DType: tensor.Uint8, Shape: []int{samples, 1, 28, 28}, Data: p.images})
	check(t, err)
	_, err = db.Set(prefix+"labels", tensor.Tensor{DType: tensor.Uint8, Shape: []int{samples}, Data: p.labels})
	check(t, err)
	dir, err := os.MkdirTemp("", "spirt") // short enough for a socket
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	p.socket = filepath.Join(dir, "db")
	p.serve(t)
	p.event = Event{
		Database: Database{Network: "unix", Address: p.socket}, Model: spec,
		Parameters: Parameters{Key: prefix + "parameters", Version: version},
		Images:     prefix + "images", Labels: prefix + "labels", Scale: 1.0 / 128, Offset: -1,
	}
	return p
}

// serve starts a server of the database; its Close ends all connections.
func (p *peer) serve(t testing.TB) {
	t.Helper()
	listener, err := net.Listen("unix", p.socket)
	check(t, err)
	server := tensordb.NewServer(p.db, tensordb.ServerConfig{Tokens: []tensordb.Token{{Secret: secret, Prefix: prefix, Access: tensordb.Function}}})
	p.server = server
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// rows are the samples of a minibatch.
func rows(minibatch, n int) []int {
	list := make([]int, n)
	for i := range list {
		list[i] = (minibatch*n + i*3) % samples
	}
	return list
}

// gradient is an event for the gradient of a minibatch of n samples.
func (p *peer) gradient(minibatch, n int) Event {
	e := p.event
	e.Task, e.Minibatch, e.Accumulate, e.Rows = TaskGradient, minibatch, prefix+"gradient", rows(minibatch, n)
	return e
}

// reference computes loss, correct answers and gradient without database and function.
func (p *peer) reference(rows []int) (loss float64, correct int, gradient []float32) {
	in := p.model.InputLen()
	x := make([]float32, 0, len(rows)*in)
	labels := make([]int32, len(rows))
	for i, row := range rows {
		for _, b := range p.images[row*in : (row+1)*in] {
			x = append(x, float32(float32(b)*p.event.Scale)+p.event.Offset)
		}
		labels[i] = int32(p.labels[row])
	}
	gradient = make([]float32, len(p.params))
	loss, correct = p.model.Gradient(gradient, p.params, x, labels, p.model.NewWorkspace(len(rows)))
	return loss, correct, gradient
}

// floats copies a vector of the database.
func (p *peer) floats(t testing.TB, key string) []float32 {
	t.Helper()
	ref, err := p.db.Get(key)
	check(t, err)
	defer ref.Release()
	return append([]float32(nil), tensor.Floats(ref.Tensor().Data)...)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
