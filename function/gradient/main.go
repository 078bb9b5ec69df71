package gradient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime/debug"

	"github.com/aws/aws-lambda-go/lambda"
	"github.com/aws/aws-lambda-go/lambda/messages"
)

// gcPercent makes the collector run before garbage adds half to what is in use: an instance's large memory is
// allocated once, and what an invocation leaves behind is small.
const gcPercent = 50

// Main runs the function on the Lambda Runtime API whose address is in AWS_LAMBDA_RUNTIME_API, with the database token
// of SPIRT_DB_TOKEN. It returns an exit status only if it could not start; else the process ends when its API has gone.
func Main() int {
	if os.Getenv("AWS_LAMBDA_RUNTIME_API") == "" {
		fmt.Fprintln(os.Stderr, "this function has no runtime: AWS_LAMBDA_RUNTIME_API is not set; instances are started by a peer, by AWS Lambda or by `spirt function serve`")
		return 2
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	lambda.Start(&served{NewHandler(configFromEnv())})
	return 1
}

// served is a Handler as the runtime calls it: bytes in, bytes out.
type served struct{ *Handler }

func (s *served) Invoke(ctx context.Context, payload []byte) ([]byte, error) {
	e, err := decodeEvent(payload)
	if err == nil {
		var result Result
		if result, err = s.Handler.Invoke(ctx, e); err == nil {
			return json.Marshal(result)
		}
	}
	var typed *Error
	if errors.As(err, &typed) {
		return nil, messages.InvokeResponse_Error{Type: typed.Type, Message: typed.Message}
	}
	return nil, err
}
