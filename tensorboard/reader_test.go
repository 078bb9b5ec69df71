//go:build integration

package tensorboard

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/spirt-ml/spirt/events"
)

// TensorBoard itself reads what is written, over two files of one run.
func TestReader(t *testing.T) {
	dir := t.TempDir()
	for again := range uint64(2) {
		w, err := Create(dir)
		if err != nil {
			t.Fatal(err)
		}
		accuracy := 0.75
		n, at := 2*again+1, start()
		w.all(t, round(1, n, 1, 0), round(2, n, 3, 0), round(1, n+1, 2, 1), round(2, n+1, 3, 1),
			&events.Event{Event: "validation", Peer: 1, Round: n + 1, Accuracy: &accuracy, Time: at})
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(filepath.Join("..", ".cache", "tensorboard", "bin", "python"), "-c", `
import sys
from tensorboard.backend.event_processing import event_accumulator
a = event_accumulator.EventAccumulator(sys.argv[1])
a.Reload()
for tag in sorted(a.Tags()["scalars"]):
    print(tag, [(s.step, s.value) for s in a.Scalars(tag)])
`, dir)
	got, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: .ci/run installs the reader into .cache/tensorboard\n%s", err, got)
	}
	const want = `cost/usd_per_round [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5)]
images_per_second [(1, 256.0), (2, 256.0), (3, 256.0), (4, 256.0)]
loss [(1, 2.0), (2, 2.5), (3, 2.0), (4, 2.5)]
peer/1/loss [(1, 1.0), (2, 2.0), (3, 1.0), (4, 2.0)]
peer/2/loss [(1, 3.0), (2, 3.0), (3, 3.0), (4, 3.0)]
round/seconds [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5)]
validation/accuracy [(2, 0.75), (4, 0.75)]
`
	if string(got) != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}
