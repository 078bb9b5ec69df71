package spirt

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/spirt-ml/spirt/nn"
)

// A peer that ends alone, long after the others, does not replace the model
// that they agreed on.
func TestModelOfOthersStays(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	job := Job{Peers: 1, Model: "logistic", Rounds: 2, BatchSize: 8}
	check(t, job.Resolve())
	check(t, createRun(dir, job))
	spec, err := nn.Builtin(job.Model)
	check(t, err)
	model, err := nn.New(spec)
	check(t, err)
	theirs := Trained{Model: model, Parameters: make([]float32, model.NumParams()), Scale: 1}
	model.Init(theirs.Parameters, 99)
	path, own := filepath.Join(dir, modelFile), filepath.Join(peerDir(dir, 1), modelFile)
	check(t, theirs.Write(path))

	check(t, RunPeer(t.Context(), PeerConfig{Run: dir, Peer: 1, Executable: os.Args[0]}))
	got, err := ReadModel(path)
	check(t, err)
	if got.Hash() != theirs.Hash() {
		t.Errorf("the run's model is %s, it was %s", got.Hash(), theirs.Hash())
	}
	if _, err := ReadModel(own); err != nil {
		t.Errorf("this peer's model: %v", err)
	}

	// Started again at its end, it leaves the same once more.
	check(t, os.Remove(path))
	check(t, RunPeer(t.Context(), PeerConfig{Run: dir, Peer: 1, Executable: os.Args[0]}))
	mine, err := ReadModel(own)
	check(t, err)
	got, err = ReadModel(path)
	check(t, err)
	if got.Hash() != mine.Hash() {
		t.Errorf("started again the peer left the model %s, before %s", got.Hash(), mine.Hash())
	}
	if _, err := os.Stat(filepath.Join(peerDir(dir, 1), lockFileName)); errors.Is(err, os.ErrNotExist) {
		t.Error("the peer took no lock")
	}
}
