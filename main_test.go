package spirt

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/aws/aws-lambda-go/lambda"

	"github.com/spirt-ml/spirt/function/gradient"
)

// hangVariable is the address that a function connects to when it is invoked,
// after which it does nothing.
const hangVariable = "SPIRT_TEST_HANG"

// The test binary is the gradient function too, when a platform starts it, and
// a peer that is killed at some step.
func TestMain(m *testing.M) {
	if os.Getenv("AWS_LAMBDA_RUNTIME_API") != "" {
		if address := os.Getenv(hangVariable); address != "" {
			lambda.Start(func(ctx context.Context) error {
				conn, err := net.Dial("tcp", address)
				if err != nil {
					return err
				}
				defer conn.Close()
				<-ctx.Done()
				return ctx.Err()
			})
		}
		os.Exit(gradient.Main())
	}
	if text := os.Getenv(killVariable); text != "" {
		os.Exit(killedPeer(text))
	}
	os.Exit(m.Run())
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// refused fails unless err says all of this.
func refused(t testing.TB, err error, says ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one that says %q", says)
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("the error %q does not say %q", err, s)
		}
	}
}

// writeTemp makes a file with this content.
func writeTemp(t testing.TB, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	check(t, os.WriteFile(path, []byte(content), 0o644))
	return path
}
