package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt"
)

// writerFunc is a function as a writer.
type writerFunc func(string)

func (f writerFunc) Write(b []byte) (int, error) {
	f(string(b))
	return len(b), nil
}

// Who interrupts a plan that is being measured has nothing left of it.
func TestPlanInterrupted(t *testing.T) {
	data, err := filepath.Abs(filepath.Join("..", "..", "dataset", "mnist-10k"))
	if err != nil {
		t.Fatal(err)
	}
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var said, out strings.Builder
	code := run(ctx, []string{"plan", "--data", "idx:" + data, "--model", "logistic", "--measure", "1000"}, &out, writerFunc(func(s string) {
		said.WriteString(s)
		if strings.Contains(s, "training") {
			cancel()
		}
	}))
	if code != spirt.ExitInterrupted || out.Len() > 0 || !strings.Contains(said.String(), "interrupted") {
		t.Errorf("exit code %d, %q, %q", code, out.String(), said.String())
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
